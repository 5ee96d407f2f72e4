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

SEED = 0  # any other does as well
unet.DEVICE, unet.BF16 = torch.device("cpu"), False  # the same numbers on every machine
torch.set_num_threads(1)  # networks this small only wait for a second thread
TOYS = unet.open_pairs("toy", "test")

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

def batch(pairs):
    """Images and masks of 32 x 32 pixels, as a DataLoader gives them."""
    return next(iter(unet.DataLoader(unet.PetDataset(pairs, 32), len(pairs))))

def row(classes):
    """An image and a mask of 1 x n pixels: "012" is red, green, blue, or the classes 0, 1, 2."""
    mask = torch.tensor([[int(digit) for digit in classes]])
    return 255 * F.one_hot(mask, 3).movedim(-1, 0).byte(), mask

def test_a_sample_is_an_image_of_bytes_and_a_mask_of_classes():
    dataset = unet.PetDataset(TOYS[:1], 128)
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
    image = Image.frombytes("L", (32, 32), bytes([255] * 16 + [0] * 16) * 32).convert("RGB")
    trimap = Image.frombytes("L", (32, 32), bytes([1] * 16 + [3] * 16) * 32)
    dataset = unet.PetDataset([(image, trimap)], 32, mirror=True)
    samples = [dataset[0] for _ in range(40)]
    assert all(torch.equal(image[0] == 255, mask == 0) for image, mask in samples)
    assert 5 < sum(image[0, 0, 0] == 255 for image, mask in samples) < 35

def test_without_mirroring_an_image_is_always_the_same():
    dataset = unet.PetDataset(TOYS[:1], 32)
    assert all(torch.equal(dataset[0][0], dataset[0][0]) for _ in range(20))

@pytest.mark.parametrize("mode, label", [("L", 0), ("L", 4), ("L", 255), ("I;16", 257)])
def test_a_label_without_a_class_is_refused(mode, label):
    Image.new(mode, (32, 32), label).save("trimap.png")
    pair = Image.new("RGB", (32, 32)), Image.open("trimap.png")
    pytest.raises(ValueError, unet.PetDataset, [pair], 32).match(rf"trimap\.png.*{label}.*3")

def test_an_index_error_of_a_dataset_is_not_taken_for_its_end():
    class Broken(list):
        def __getitem__(self, i):
            return super().__getitem__(i + 1)
    pytest.raises(IndexError, unet.PetDataset, Broken(TOYS[:3]), 32)

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

@pytest.mark.parametrize("device, cuda, cpu, wanted", [
    ("cpu", True, True, "cpu bf16"), ("cpu", True, False, "cpu"), ("mps", True, True, "mps"),
    ("cuda", True, False, "cuda bf16"), ("cuda", False, True, "cuda")])
def test_device_and_bf16_follow_the_hardware(device, cuda, cpu, wanted, monkeypatch):
    found = None if device == "cpu" else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": cpu})
    page = runpy.run_path(unet.__file__)
    assert page["DEVICE"].type + " bf16" * page["BF16"] == wanted

@pytest.mark.filterwarnings("ignore:.*is a no-op")  # a meta tensor takes no saved values
@pytest.mark.parametrize("words, value", [("train --data toy --size 32", "loss.item()"),
    ("test", ".item()"), ("show", ".cpu()"), ("predict cat.jpg", ".cpu()")])
def test_every_tensor_is_on_the_device(words, value, trained, monkeypatch):
    """The meta device has shapes but no values: a command gets as far as its first value."""
    TOYS[0][0].save("cat.jpg")
    Path("unet.pt").write_bytes(trained.read_bytes())
    unet.DEVICE = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", MagicMock())
    stop = pytest.raises((RuntimeError, NotImplementedError), shell, words)
    lines = [call.line for call in traceback.extract_tb(stop.tb) if call.filename == unet.__file__]
    assert stop.match("on meta|of meta") and value in lines[-1]
    assert torch.autocast.call_args.args[0] == "meta"

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
    pairs = zip("000000122", "000000012")  # predictions and masks
    dataset = [(row(prediction)[0], row(mask)[1]) for prediction, mask in pairs]
    scores = unet.evaluate(nn.Identity(), dataset)
    losses = [unet.evaluate(nn.Identity(), [sample])["loss"] for sample in dataset]
    assert scores["mIoU"] == pytest.approx((6 / 7 + 0 / 2 + 1 / 2) / 3)
    assert scores["Dice"] == pytest.approx((12 / 13 + 0 / 2 + 2 / 3) / 3)
    assert scores["loss"] == pytest.approx(sum(losses) / 9)

def test_evaluate_is_no_training():
    """In training, dropout would turn nine of ten logits to 0."""
    assert unet.evaluate(nn.Dropout(0.9).train(), [row("012210")])["mIoU"] == 1

def test_gradients_do_not_pile_up():
    """The mean of the logits has the same gradient in each step, so equal steps follow."""
    unet.loss_fn = lambda logits, masks: logits.mean()
    net, weights = nn.Conv2d(3, 3, 1), []
    for _ in range(3):
        weights.append(net.weight.detach().clone())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        unet.train_epoch(net, [batch(TOYS[:2])], optimizer, Mock())
    torch.testing.assert_close(weights[2] - weights[1], weights[1] - weights[0])
    assert not torch.equal(weights[0], weights[1])

def test_an_epoch_is_in_training_mode_and_returns_the_mean_loss():
    losses = iter(torch.tensor([1.0, 4.0], requires_grad=True))
    unet.loss_fn = lambda logits, masks: next(losses)
    net = unet.UNet(base=2).eval()
    assert unet.train_epoch(net, [batch(TOYS[:2])] * 2, Mock(), Mock()) == 2.5
    assert net.training

def test_the_learning_rate_rises_to_lr_and_falls_almost_to_0():
    """A hook notes the rate of each step, in 4 epochs of 240 images, 60 in a batch."""
    rates = []
    hook = register_optimizer_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    unet.train("toy", epochs=4, batch_size=60, size=32, base=2, lr=0.02)
    hook.remove()
    top = rates.index(max(rates))
    assert (len(rates), rates[top]) == (4 * 4, pytest.approx(0.02, rel=0.1))
    assert 0 < top < 8
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert max(rates[0], rates[-1]) < 0.002

def test_overfits_one_batch():
    """Any network must be able to learn four images by heart."""
    net, (images, masks) = unet.UNet(base=8), batch(TOYS[:4])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        unet.train_epoch(net, [(images, masks)], optimizer, Mock())
    assert (net(images / 255).argmax(dim=1) == masks).float().mean() > 0.98

@pytest.fixture
def no_steps(monkeypatch):
    """`train` on ten images of 0, 20, ... 180, but without any step or score."""
    trimap = Image.new("L", (9, 9), 1)
    pairs = [(Image.new("RGB", (9, 9), (20 * k,) * 3), trimap) for k in range(10)]
    monkeypatch.setattr(unet, "open_pairs", lambda data, split: {"trainval": pairs}[split])
    monkeypatch.setattr(unet, "train_epoch", Mock(return_value=1.0))
    monkeypatch.setattr(unet, "evaluate", Mock(return_value={"loss": 1.0, "mIoU": 0.5}))

def colours(dataset):
    return [image[0, 0, 0].item() for image, mask in dataset]

def test_validation_images_are_never_learned(no_steps):
    unet.train(size=32, base=2)
    learned = colours(unet.train_epoch.call_args.args[1].dataset)
    validated = colours(unet.evaluate.call_args.args[1])
    assert sorted(learned + validated) == list(range(0, 200, 20))

def test_each_seed_validates_the_same_images_with_other_weights(no_steps):
    for seed in (1, 2):
        unet.train(size=32, base=2, epochs=1, seed=seed)
    (net1, val_set1), (net2, val_set2) = [call.args for call in unet.evaluate.call_args_list]
    assert colours(val_set1) == colours(val_set2)
    assert colours(val_set1) not in ([0, 20], [160, 180])  # the list is shuffled
    assert not torch.equal(net1.final.weight, net2.final.weight)

def test_only_training_images_are_mirrored_and_shuffled(no_steps):
    unet.train(size=32, base=2)
    loader, val_set = unet.train_epoch.call_args.args[1], unet.evaluate.call_args.args[1]
    assert (loader.dataset.mirror, val_set.mirror) == (True, False)
    orders = [next(iter(loader))[0][:, 0, 0, 0].tolist() for _ in range(5)]
    assert orders.count(orders[0]) < 5

@pytest.mark.parametrize("wrong, told", [({"data": "few"}, "few.*4.*5"),
    ({"size": 100}, "16.*100"), ({"size": 16}, "16.*32.*16"), ({"size": 0}, "16.*0")])
def test_what_cannot_be_trained_is_refused_at_once(wrong, told, no_steps):
    unet.open_pairs = lambda data, split: [None] * 4  # too few, and they cannot be decoded
    pytest.raises(ValueError, unet.train, **wrong).match(told)

@pytest.mark.parametrize("train_loss, val_loss", [(math.nan, 1), (1, math.nan), (1, math.inf)])
def test_a_run_that_fails_keeps_the_old_checkpoint(train_loss, val_loss, no_steps):
    Path("unet.pt").write_text("precious")
    unet.train_epoch.return_value, unet.evaluate.return_value["loss"] = train_loss, val_loss
    pytest.raises(ValueError, unet.train, size=32, base=2).match("lr")
    assert Path("unet.pt").read_text() == "precious"

def test_a_half_written_checkpoint_replaces_nothing():
    Path("unet.pt").write_text("precious")
    unsaved = (k for k in range(3))  # what cannot be written
    pytest.raises(TypeError, unet.save, "unet.pt", unet.UNet(base=2), history=unsaved)
    assert Path("unet.pt").read_text() == "precious"

def test_load_gives_a_network_in_eval_mode(trained):
    assert not unet.load(trained)[1].training

@pytest.mark.parametrize("final", [nn.Conv2d(8, 2, 1), nn.Conv2d(8, 3, 1, bias=False)])
def test_a_network_of_other_classes_or_layers_is_not_loaded(final):
    net = unet.UNet(base=8)
    net.final = final
    unet.save("other.pt", net, base=8)
    pytest.raises(RuntimeError, unet.load, "other.pt").match("final")

def test_a_pickle_that_would_run_a_command_is_refused():
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch sprung'\ntR.")
    pytest.raises(Exception, unet.load, "evil.pt").match("weights_only")

def test_the_shell_and_a_call_train_the_same_network():
    """In two processes: each option reaches its parameter, and the seed decides the rest."""
    call = "import unet; unet.train('toy', 'a/1.pt', 1, 60, 48, 2, 0.01, 3)"
    words = "--epochs 1 --batch-size 60 --size 48 --base 2 --lr 0.01 --seed 3 --data toy".split()
    paths = {"PYTHONPATH": str(Path(unet.__file__).parent), "CUDA_VISIBLE_DEVICES": ""}
    for command in (["-c", call], [unet.__file__, "train", *words, "--checkpoint", "a/2.pt"]):
        subprocess.run([sys.executable, *command], env=os.environ | paths, check=True)
    one, two = torch.load("a/1.pt"), torch.load("a/2.pt")
    torch.testing.assert_close(one.pop("model"), two.pop("model"))
    assert one == two
    assert (one["data"], one["size"], one["base"], len(one["history"])) == ("toy", 48, 2, 1)

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
    rows = images.movedim(1, -1), unet.COLOURS[masks], unet.COLOURS[predictions]
    wanted = unet.utils.make_grid(torch.cat(rows).movedim(-1, 1), nrow=6).movedim(0, -1)
    assert torch.equal(torch.tensor(grid.images[0].get_array()), wanted)
    lines = {line.get_label(): list(line.get_ydata()) for line in curves.lines}
    history = torch.load(trained)["history"]
    assert all(lines[name] == [row[name] for row in history] for name in history[0])

def test_predict_draws_enlarged_logits_over_the_upright_photo(trained):
    photo, exif = TOYS[0][0], Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise, as the camera was held
    photo.transpose(Image.Transpose.ROTATE_90).convert("RGBA").save("a.b.png", exif=exif)
    shell(f"predict --checkpoint {trained} a.b.png")
    logits = unet.load(trained)[1](batch(TOYS[:1])[0] / 255)
    classes = F.interpolate(logits, size=(160, 192), mode="bilinear").argmax(dim=1)[0]
    wanted = (unet.COLOURS[classes].float().movedim(-1, 0) + unet.pil_to_tensor(photo)) / 2
    drawn = unet.pil_to_tensor(Image.open("a.b-overlay.png"))
    assert (drawn - wanted).abs().max() <= 1

def test_the_help_shows_the_defaults_of_the_function(capsys):
    pytest.raises(SystemExit, shell, "train --help")
    text = " ".join(capsys.readouterr().out.split())
    for name, parameter in inspect.signature(unet.train).parameters.items():
        option = f"--{name.replace('_', '-')} {name.upper()}"
        assert re.search(rf"{option} [^-]+\(default: {parameter.default}\b", text), option

@pytest.mark.parametrize("words, told", [
    ("", "2"), ("train --epochs many", "2"), ("test --epochs 1", "2"), ("predict", "2"),
    ("test", "unet.pt.*train"), ("test --checkpoint toy.pt --data nowhere", "nowhere.*train"),
    ("predict none.jpg --checkpoint toy.pt", "none.jpg"), ("train", "no route.*toy"),
    ("predict --checkpoint toy.pt no.jpg", "no.jpg"), ("predict --checkpoint toy.pt a.png", "178")])
def test_a_wrong_command_ends_in_one_line(words, told, trained, monkeypatch):
    """The 2 is the exit code of argparse, after the line with its usage."""
    Path("toy.pt").write_bytes(trained.read_bytes())
    Path("no.jpg").write_text("no image")
    Image.new("1", (20_000, 10_000)).save("a.png")
    error = urllib.error.URLError("no route")
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=error))
    pytest.raises(SystemExit, shell, words).match(rf"\A\s*.*{told}.*\Z")
