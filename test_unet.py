"""Tests of unet.py in the order of the page, as a second explanation of it. Five to read first:
test_every_shape_on_the_page_is_the_real_one, test_a_decoder_block_gets_up_and_skip,
test_iou_and_dice_by_hand, test_gradients_do_not_pile_up and test_overfits_one_batch."""
import inspect, math, os, re, runpy, subprocess, sys, traceback, urllib.error
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest, torch, unet
import torch.nn as nn, torch.nn.functional as F
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

SEED = 0  # any other does as well
unet.DEVICE, unet.BF16 = torch.device("cpu"), False  # the same numbers on every machine
torch.set_num_threads(1)  # networks this small only wait for a second thread

@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Each test starts from the same seed, in an empty folder, and may set these globals."""
    torch.manual_seed(SEED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unet.py"])
    for name in ("DEVICE", "BF16", "loss_fn"):
        monkeypatch.setattr(unet, name, getattr(unet, name))

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a small network that has learned the toy data."""
    path = tmp_path_factory.mktemp("trained") / "toy.pt"
    unet.train("toy", path, epochs=5, size=32, base=8, lr=3e-3, seed=SEED)
    return path

def shell(words):
    sys.argv[1:] = words.split()
    unet.main()

def toys(count):
    return [unet.draw_pair(str(k)) for k in range(count)]

def batch(pairs):
    """Images and masks of 32 x 32 pixels, as a DataLoader gives them."""
    return next(iter(DataLoader(unet.PetDataset(pairs, 32), len(pairs))))

def row(classes):
    """An image and a mask of 1 x n pixels: "012" is red, green, blue, or the classes 0, 1, 2."""
    mask = torch.tensor([[int(digit) for digit in classes]])
    return 255 * F.one_hot(mask, 3).movedim(-1, 0).byte(), mask

# -------- data --------
def test_a_sample_is_an_image_of_bytes_and_a_mask_of_classes():
    dataset = unet.PetDataset(toys(1), 128)
    image, mask = dataset[0]
    assert (image.shape, image.dtype) == ((3, 128, 128), torch.uint8)
    assert (mask.shape, mask.dtype, mask.unique().tolist()) == ((128, 128), torch.int64, [0, 1, 2])
    assert sum(part.nbytes for part in dataset.samples[0]) == 64 * 1024

def test_masks_are_resized_without_new_labels():
    """Stripes of pet (1) and border (3). Their mean would be background (2)."""
    stripes = Image.frombytes("L", (96, 96), bytes([1, 3, 3] * 32 * 96))
    image, mask = unet.PetDataset([(stripes.convert("RGB"), stripes)], 64)[0]
    assert mask.unique().tolist() == [0, 2]

def test_mirroring_turns_image_and_mask_together():
    """White pet on the left, black border on the right."""
    image, trimap = Image.new("RGB", (32, 32)), Image.new("L", (32, 32), 3)
    image.paste("white", (0, 0, 16, 32))
    trimap.paste(1, (0, 0, 16, 32))
    dataset = unet.PetDataset([(image, trimap)], 32, mirror=True)
    samples = [dataset[0] for _ in range(40)]
    assert all(torch.equal(image[0] == 255, mask == 0) for image, mask in samples)
    assert 5 < sum(image[0, 0, 0] == 255 for image, mask in samples) < 35

def test_without_mirroring_an_image_is_always_the_same():
    dataset = unet.PetDataset(toys(1), 32)
    assert all(torch.equal(dataset[0][0], dataset[0][0]) for _ in range(20))

@pytest.mark.parametrize("mode, label", [("L", 0), ("L", 4), ("L", 255), ("I;16", 257)])
def test_a_label_without_a_class_is_refused(mode, label):
    Image.new(mode, (32, 32), label).save("trimap.png")
    with pytest.raises(ValueError, match=rf"trimap\.png.*{label}.*3"):
        unet.PetDataset([(Image.new("RGB", (32, 32)), Image.open("trimap.png"))], 32)

def test_an_index_error_of_a_dataset_is_not_taken_for_its_end():
    class Broken(list):
        def __getitem__(self, i):
            return super().__getitem__(i + 1)
    with pytest.raises(IndexError):
        unet.PetDataset(Broken(toys(3)), 32)

def test_toy_images_of_training_and_test_are_different():
    pairs = unet.open_pairs("toy", "trainval") + unet.open_pairs("toy", "test")
    assert len({image.tobytes() for image, trimap in pairs}) == 600

# -------- model --------
def test_every_shape_on_the_page_is_the_real_one():
    """Run each line of UNet.forward by itself: are its comment and the drawing right?"""
    source = inspect.getsource(unet.UNet.forward).replace("def forward(self, x):", "x = x")
    lines = re.findall(r"(\w+)(?: =)? (.+?) +# \(N, +(\d+), +(\d+), +(\d+)\)", source)
    drawn = re.findall(r"(\w+) +\((\d+), (\d+), (\d+)\)", unet.__doc__)
    assert (len(lines), len(drawn)) == (19, 11)
    values = {"self": unet.UNet(base=64), "torch": torch, "x": torch.zeros(2, 3, 128, 128)}
    for name, code, *shape in lines:
        values[name] = eval(code, values)
        assert values[name].shape == (2, *map(int, shape)), code
    short = {"image": "x", "logits": "return", "bottleneck": "b"}  # enc1 is e1, dec1 is d1
    for name, *shape in drawn:
        assert values[short.get(name, name[0] + name[-1])].shape == (2, *map(int, shape)), name

def test_a_block_is_convolution_batchnorm_relu_twice():
    block, x = unet.conv_block(3, 5), torch.randn(2, 3, 8, 8)
    y = F.batch_norm(F.conv2d(x, block[0].weight, padding=1), None, None, training=True).relu()
    y = F.batch_norm(F.conv2d(y, block[3].weight, padding=1), None, None, training=True).relu()
    torch.testing.assert_close(block(x), y)

@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_decoder_block_gets_up_and_skip(level):
    """Half of its input is what up made, the other half what enc made, before pooling."""
    net, seen = unet.UNet(base=2), {}
    for name in (f"enc{level}", f"up{level}", f"dec{level}"):
        def note(layer, inputs, output, name=name):
            seen[name] = inputs[0] if "dec" in name else output
        net.get_submodule(name).register_forward_hook(note)
    net(torch.randn(1, 3, 32, 32))
    assert torch.equal(seen[f"dec{level}"], torch.cat((seen[f"up{level}"], seen[f"enc{level}"]), 1))

def test_up_makes_four_pixels_of_one():
    up, x = unet.UNet(base=2).up1, torch.zeros(1, 4, 3, 3)
    before = up(x)
    x[:, :, 1, 1] = 1
    changed = (up(x) != before)[0, 0]
    assert changed.nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]

# -------- device --------
@pytest.mark.parametrize("device, cuda, cpu, wanted", [
    ("cpu", True, True, "cpu bf16"), ("cpu", True, False, "cpu"), ("mps", True, True, "mps"),
    ("cuda", True, False, "cuda bf16"), ("cuda", False, True, "cuda")])
def test_device_and_bf16_follow_the_hardware(device, cuda, cpu, wanted, monkeypatch):
    def cuda_has_bf16(including_emulation=True):
        return including_emulation or cuda
    found = None if device == "cpu" else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", cuda_has_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": cpu})
    page = runpy.run_path(unet.__file__)
    assert page["DEVICE"].type + " bf16" * page["BF16"] == wanted

def test_convolutions_are_in_bfloat16_and_logits_in_float32():
    unet.BF16, net, seen = True, unet.UNet(base=2), []
    net.enc1[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    logits = unet.compute_logits(net, torch.zeros(1, 3, 32, 32).byte())
    assert (seen, logits.dtype) == ([torch.bfloat16], torch.float32)

@pytest.mark.filterwarnings("ignore:.*is a no-op")  # a meta tensor takes no saved values
@pytest.mark.parametrize("words, value", [("train --data toy --size 32", "loss.item()"),
    ("test", ".item()"), ("show", ".cpu()"), ("predict cat.jpg", ".cpu()")])
def test_every_tensor_is_on_the_device(words, value, trained, monkeypatch):
    """The meta device has shapes but no values: a command gets as far as its first value."""
    toys(1)[0][0].save("cat.jpg")
    Path("unet.pt").write_bytes(trained.read_bytes())
    unet.DEVICE = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", MagicMock())
    with pytest.raises((RuntimeError, NotImplementedError), match="on meta|of meta") as stop:
        shell(words)
    lines = [call.line for call in traceback.extract_tb(stop.tb) if call.filename == unet.__file__]
    assert value in lines[-1]
    assert torch.autocast.call_args.args[0] == "meta"

# -------- loss and scores --------
def test_cross_entropy_by_hand():
    """Two pixels whose true classes have the probabilities 0.6 and 0.5."""
    probabilities = torch.tensor([[[[0.6, 0.3]], [[0.2, 0.5]], [[0.2, 0.2]]]])  # (1, 3, 1, 2)
    loss = unet.loss_fn(probabilities.log(), torch.tensor([[[0, 1]]]))
    assert loss.item() == pytest.approx((-math.log(0.6) - math.log(0.5)) / 2)

def test_iou_and_dice_by_hand():
    """nn.Identity gives an image back as its logits, so it predicts 0 for red and 1 for green."""
    scores = unet.evaluate(nn.Identity(), [(row("0110")[0], row("1100")[1])])
    assert scores["IoU pet"] == pytest.approx(1 / 3)  # one of the pixels 1, 3 and 4
    assert scores["IoU background"] == pytest.approx(1 / 3)  # one of the pixels 1, 2 and 3
    assert math.isnan(scores["IoU border"])  # it is nowhere, and in no mean
    assert scores["mIoU"] == pytest.approx(1 / 3)
    assert scores["Dice"] == pytest.approx(2 / 4)

def test_pixels_and_losses_count_equally_in_every_batch():
    """Nine images of one pixel make a batch of eight and a batch of one."""
    pairs = zip("000000122", "000000012")
    dataset = [(row(prediction)[0], row(mask)[1]) for prediction, mask in pairs]
    scores = unet.evaluate(nn.Identity(), dataset)
    losses = [unet.evaluate(nn.Identity(), [sample])["loss"] for sample in dataset]
    assert scores["mIoU"] == pytest.approx((6 / 7 + 0 / 2 + 1 / 2) / 3)
    assert scores["Dice"] == pytest.approx((12 / 13 + 0 / 2 + 2 / 3) / 3)
    assert scores["loss"] == pytest.approx(sum(losses) / 9)

def test_evaluate_is_no_training():
    """In training, dropout would turn nine of ten logits to 0."""
    scores = unet.evaluate(nn.Dropout(0.9).train(), [row("012210")])
    assert scores["mIoU"] == 1

# -------- training --------
def test_gradients_do_not_pile_up():
    """The mean of the logits has the same gradient in each step, so equal steps follow."""
    unet.loss_fn = lambda logits, masks: logits.mean()
    net, weights = nn.Conv2d(3, 3, 1), []
    for _ in range(3):
        weights.append(net.weight.detach().clone())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        unet.train_epoch(net, [batch(toys(2))], optimizer, Mock())
    torch.testing.assert_close(weights[2] - weights[1], weights[1] - weights[0])
    assert not torch.equal(weights[0], weights[1])

def test_an_epoch_is_in_training_mode_and_returns_the_mean_loss():
    losses = iter(torch.tensor([1.0, 4.0], requires_grad=True))
    unet.loss_fn = lambda logits, masks: next(losses)
    net = unet.UNet(base=2).eval()
    assert unet.train_epoch(net, [batch(toys(2))] * 2, Mock(), Mock()) == 2.5
    assert net.training

def test_the_learning_rate_rises_to_lr_and_falls_almost_to_0():
    """A hook notes the rate of each step, in 4 epochs of 240 images, 60 in a batch."""
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    unet.train("toy", epochs=4, batch_size=60, size=32, base=2, lr=0.02)
    hook.remove()
    top = rates.index(max(rates))
    assert (len(rates), max(rates)) == (4 * 4, pytest.approx(0.02, rel=0.1))
    assert 0 < top < 8
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert max(rates[0], rates[-1]) < 0.002

@pytest.fixture
def watched(monkeypatch):
    """`train` without its steps, on ten images of 0, 20, ... 180. What would it learn from?"""
    def pair(colour):
        return Image.new("RGB", (9, 9), (colour,) * 3), Image.new("L", (9, 9), 1)
    seen = {"pairs": [pair(20 * k) for k in range(10)], "train loss": 1.0, "val loss": 1.0}
    def train_epoch(net, loader, optimizer, schedule):
        seen.update(net=net, loader=loader)
        return seen["train loss"]
    def evaluate(net, dataset):
        seen["val_set"] = dataset
        return {"loss": seen["val loss"], "mIoU": 0.5}
    monkeypatch.setattr(unet, "open_pairs", lambda data, split: {"trainval": seen["pairs"]}[split])
    monkeypatch.setattr(unet, "train_epoch", train_epoch)
    monkeypatch.setattr(unet, "evaluate", evaluate)
    return seen

def colours(dataset):
    return [image[0, 0, 0].item() for image, mask in dataset]

def test_validation_images_are_never_learned(watched):
    unet.train(size=32, base=2)
    learned, validated = colours(watched["loader"].dataset), colours(watched["val_set"])
    assert sorted(learned + validated) == list(range(0, 200, 20))
    assert len(validated) == 2

def test_each_seed_validates_the_same_images_with_other_weights(watched):
    splits, weights = [], []
    for seed in (1, 2):
        unet.train(size=32, base=2, seed=seed)
        splits.append(colours(watched["val_set"]))
        weights.append(watched["net"].final.weight)
    assert splits[0] == splits[1]
    assert splits[0] not in ([0, 20], [160, 180])  # the list is shuffled
    assert not torch.equal(*weights)

def test_only_training_images_are_mirrored_and_shuffled(watched):
    unet.train(size=32, base=2, batch_size=8)
    assert (watched["loader"].dataset.mirror, watched["val_set"].mirror) == (True, False)
    orders = [next(iter(watched["loader"]))[0][:, 0, 0, 0].tolist() for _ in range(5)]
    assert orders.count(orders[0]) < 5

@pytest.mark.parametrize("wrong, told", [({"data": "few"}, "few.*4.*5"),
    ({"size": 100}, "16.*100"), ({"size": 16}, "16.*32.*16"), ({"size": 0}, "16.*0")])
def test_what_cannot_be_trained_is_refused_at_once(wrong, told, watched):
    watched["pairs"] = [None] * 4  # too few, and they cannot be decoded
    with pytest.raises(ValueError, match=told):
        unet.train(**wrong)

@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["train loss", "val loss"])
def test_a_run_that_fails_keeps_the_old_checkpoint(name, value, watched):
    Path("unet.pt").write_text("precious")
    watched[name] = value
    with pytest.raises(ValueError, match="lr"):
        unet.train(size=32, base=2)
    assert Path("unet.pt").read_text() == "precious"

def test_a_half_written_checkpoint_replaces_nothing(monkeypatch):
    def fail(facts, path):
        Path(path).write_text("half")
        raise OSError
    monkeypatch.setattr(torch, "save", fail)
    Path("unet.pt").write_text("precious")
    with pytest.raises(OSError):
        unet.save("unet.pt", unet.UNet(base=2))
    assert Path("unet.pt").read_text() == "precious"

def test_load_gives_the_network_ready_to_predict(trained):
    saved, net = unet.load(trained)
    assert torch.equal(net.final.weight, saved["model"]["final.weight"])
    assert not net.training

@pytest.mark.parametrize("final", [nn.Conv2d(8, 2, 1), nn.Conv2d(8, 3, 1, bias=False)])
def test_a_network_of_other_classes_or_layers_is_not_loaded(final):
    net = unet.UNet(base=8)
    net.final = final
    unet.save("other.pt", net, base=8)
    with pytest.raises(RuntimeError, match="final"):
        unet.load("other.pt")

def test_a_pickle_that_would_run_a_command_is_refused():
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch sprung'\ntR.")
    with pytest.raises(Exception, match="weights_only"):
        unet.load("evil.pt")
    assert not Path("sprung").exists()

def test_the_shell_and_a_call_train_the_same_network():
    """In two processes: each option reaches its parameter, and the seed decides the rest."""
    call = "import unet; unet.train('toy', 'a/1.pt', 1, 60, 48, 2, 0.01, 3)"
    words = "--epochs 1 --batch-size 60 --size 48 --base 2 --lr 0.01 --seed 3 --data toy".split()
    for command in (["-c", call], [unet.__file__, "train", *words, "--checkpoint", "a/2.pt"]):
        paths = {"PYTHONPATH": str(Path(unet.__file__).parent), "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, *command], env=os.environ | paths, check=True)
    one, two = torch.load("a/1.pt"), torch.load("a/2.pt")
    torch.testing.assert_close(one.pop("model"), two.pop("model"))
    assert one == two
    assert (one["data"], one["size"], one["base"], len(one["history"])) == ("toy", 48, 2, 1)

# -------- using it --------
def test_test_scores_the_data_of_the_checkpoint(trained, capsys):
    test_set = unet.PetDataset(unet.open_pairs("toy", "test"), 32)
    scores = unet.evaluate(unet.load(trained)[1], test_set)
    shell(f"test --checkpoint {trained}")
    printed = capsys.readouterr().out
    assert "300 test images of toy" in printed
    assert all(f"{name} {value:.3f}" in printed for name, value in scores.items())

def test_show_draws_six_images_their_masks_and_predictions(trained, monkeypatch):
    figures, datasets = {}, Mock(wraps=unet.PetDataset)
    monkeypatch.setattr(unet.Figure, "savefig", lambda figure, path: figures.update({path: figure}))
    monkeypatch.setattr(unet, "PetDataset", datasets)
    unet.show(checkpoint=trained)
    assert len(datasets.call_args.args[0]) == 6  # no other image is decoded
    grid, curves = figures[trained.with_suffix(".png")].axes
    images, masks = batch(unet.open_pairs("toy", "test")[::50])
    predictions = unet.load(trained)[1](images / 255).argmax(dim=1)
    drawn = torch.tensor(grid.images[0].get_array())  # tiles of 32 x 32, with edges of 2
    for k in range(6):
        column = drawn[:, 2 + 34 * k:34 + 34 * k]
        assert torch.equal(column[2:34], images[k].movedim(0, -1))
        assert torch.equal(column[36:68], unet.COLOURS[masks[k]])
        assert torch.equal(column[70:102], unet.COLOURS[predictions[k]])
    lines = {line.get_label(): list(line.get_ydata()) for line in curves.lines}
    for name in ("train loss", "val loss", "mIoU"):
        assert lines[name] == [row[name] for row in torch.load(trained)["history"]]

def test_predict_draws_enlarged_logits_over_the_upright_photo(trained):
    photo, exif = toys(1)[0][0], Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise, as the camera was held
    photo.transpose(Image.Transpose.ROTATE_90).convert("RGBA").save("a.b.png", exif=exif)
    shell(f"predict --checkpoint {trained} a.b.png")
    logits = unet.load(trained)[1](batch(toys(1))[0] / 255)
    classes = F.interpolate(logits, size=(160, 192), mode="bilinear").argmax(dim=1)[0]
    wanted = (unet.COLOURS[classes].float().movedim(-1, 0) + unet.pil_to_tensor(photo)) / 2
    drawn = unet.pil_to_tensor(Image.open("a.b-overlay.png"))
    assert (drawn - wanted).abs().max() <= 1
    assert len(classes.unique()) == 3

# -------- the command line --------
def test_the_help_shows_the_defaults_of_the_function(capsys):
    pytest.raises(SystemExit, shell, "train --help")
    text = " ".join(capsys.readouterr().out.split())
    for name, parameter in inspect.signature(unet.train).parameters.items():
        option = f"--{name.replace('_', '-')} {name.upper()}"
        assert re.search(rf"{option} [^-]+\(default: {parameter.default}\b", text), option

@pytest.mark.parametrize("words", [
    "", "train --epochs many", "train --photo a.jpg", "test --epochs 1", "predict"])
def test_a_wrong_command_line_ends_in_usage(words, capsys):
    pytest.raises(SystemExit, shell, words).match("2")
    assert "usage: unet.py" in capsys.readouterr().err

@pytest.mark.parametrize("words, told", [
    ("test", "unet.pt.*train"), ("test --checkpoint toy.pt --data nowhere", "nowhere.*train"),
    ("predict none.jpg --checkpoint toy.pt", "none.jpg"), ("train", "no route.*toy"),
    ("predict --checkpoint toy.pt no.jpg", "no.jpg"), ("predict --checkpoint toy.pt big.png", "pixels")])
def test_an_error_ends_in_one_line(words, told, trained, monkeypatch):
    Path("toy.pt").write_bytes(trained.read_bytes())
    Path("no.jpg").write_text("no image")
    Image.new("1", (20_000, 10_000)).save("big.png")
    no_network = Mock(side_effect=urllib.error.URLError("no route"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    pytest.raises(SystemExit, shell, words).match(rf"\A\s*.*{told}.*\Z")

# -------- learning --------
def test_overfits_one_batch():
    """The first thing to try with any network: it must be able to learn four images by heart."""
    net, (images, masks) = unet.UNet(base=8), batch(toys(4))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        unet.train_epoch(net, [(images, masks)], optimizer, Mock())
    assert (net(images / 255).argmax(dim=1) == masks).float().mean() > 0.98

def test_a_longer_run_lowers_the_loss(trained):
    first, *_, last = torch.load(trained)["history"]
    assert last["train loss"] < 0.5 * first["train loss"]
    assert last["mIoU"] > 0.6  # all background has 0.27
