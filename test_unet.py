"""Tests of unet.py in the order of the page, as a second explanation of it. Five to read first:
test_every_shape_on_the_page_is_the_real_one, test_a_decoder_block_gets_up_and_skip,
test_iou_and_dice_by_hand, test_gradients_do_not_pile_up and test_overfits_one_batch."""
import inspect, math, os, re, runpy, subprocess, sys, traceback
from pathlib import Path
from unittest.mock import MagicMock, Mock
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook
import pytest, torch, unet
import torch.nn as nn, torch.nn.functional as F

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
    path = tmp_path_factory.mktemp("trained") / "toy.pt"
    unet.train("toy", path, epochs=5, size=32, base=8, lr=3e-3, seed=SEED)
    return path

def shell(words):
    sys.argv[1:] = words.split()
    unet.main()

def batch(pairs):
    return next(iter(unet.DataLoader(unet.PetDataset(pairs, 32), len(pairs))))

def a_mask(digits):
    return torch.tensor([[int(digit) for digit in digits]])  # (1, W)

def an_image(digits):
    return 255 * F.one_hot(a_mask(digits), 3).movedim(-1, 0).byte()  # 0 is red, 1 green, 2 blue

def test_a_sample_is_an_image_of_bytes_and_a_mask_of_classes():
    dataset = unet.PetDataset(TOYS[:1], 128)
    image, mask = dataset[0]
    assert (image.shape, image.dtype) == ((3, 128, 128), torch.uint8)
    assert (mask.shape, mask.dtype, mask.unique().tolist()) == ((128, 128), torch.int64, [0, 1, 2])
    assert sum(part.nbytes for part in dataset.samples[0]) == 64 * 1024

def test_masks_are_resized_without_new_labels():
    stripes = Image.frombytes("L", (96, 96), bytes([1, 3, 3] * 32 * 96))  # their mean would be 2
    image, mask = unet.PetDataset([(stripes.convert("RGB"), stripes)], 64)[0]
    assert mask.unique().tolist() == [0, 2]

def test_mirroring_turns_image_and_mask_together():
    image = Image.frombytes("L", (32, 32), bytes([255] * 16 + [0] * 16) * 32).convert("RGB")
    trimap = Image.frombytes("L", (32, 32), bytes([1] * 16 + [3] * 16) * 32)  # white pet
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
    pairs = [(TOYS[0][0], Image.open("trimap.png"))]
    pytest.raises(ValueError, unet.PetDataset, pairs, 32).match(rf"trimap\.png.*{label}.*3")

def test_an_index_error_of_a_dataset_is_not_taken_for_its_end():
    class Short:
        def __len__(self):
            return 3
        def __getitem__(self, i):
            return TOYS[:2][i]
    pytest.raises(IndexError, unet.PetDataset, Short(), 32)

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

def test_pooling_keeps_the_largest_of_2x2_pixels():
    assert unet.UNet().pool(torch.arange(16.0).view(1, 4, 4)).tolist() == [[[5, 7], [13, 15]]]

@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_decoder_block_gets_up_and_skip(level):
    """Half of its input is what up made, the other half what enc made, before pooling."""
    net, seen = unet.UNet(base=2), {}
    enc, up, dec = (net.get_submodule(f"{part}{level}") for part in ("enc", "up", "dec"))
    enc.register_forward_hook(lambda layer, inputs, output: seen.update(skip=output))
    up.register_forward_hook(lambda layer, inputs, output: seen.update(up=output))
    dec.register_forward_hook(lambda layer, inputs, output: seen.update(input=inputs[0]))
    net(torch.randn(1, 3, 32, 32))
    assert torch.equal(seen["input"], torch.cat((seen["up"], seen["skip"]), dim=1))

@pytest.mark.parametrize("device, gpu_has, cpu_has, bf16", [
    ("cpu", 1, 1, 1), ("cpu", 1, 0, 0), ("mps", 1, 1, 0), ("cuda", 1, 0, 1), ("cuda", 0, 1, 0)])
def test_device_and_bf16_follow_the_hardware(device, gpu_has, cpu_has, bf16, monkeypatch):
    found = None if device == "cpu" else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",  # an old GPU only emulates it
                        lambda including_emulation=True: including_emulation or gpu_has)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": cpu_has})
    page = runpy.run_path(unet.__file__)
    assert (page["DEVICE"].type, page["BF16"]) == (device, bf16)

@pytest.mark.filterwarnings("ignore:.*is a no-op")  # a meta tensor takes no saved values
@pytest.mark.parametrize("words, function", [("train --data toy --size 32", "train_epoch"),
    ("test", "evaluate"), ("show", "show"), ("predict cat.jpg", "predict")])
def test_a_command_gets_to_its_first_value_on_the_device(words, function, trained, monkeypatch):
    """The meta device has shapes but no values. A tensor elsewhere would stop a command before."""
    TOYS[0][0].save("cat.jpg")
    Path("unet.pt").write_bytes(trained.read_bytes())
    unet.DEVICE = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", MagicMock())
    stop = pytest.raises(RuntimeError, shell, words)
    calls = [call for call in traceback.extract_tb(stop.tb) if call.filename == unet.__file__]
    assert calls[-1].name == function and ("item()" in calls[-1].line or "cpu()" in calls[-1].line)
    assert torch.autocast.call_args.args[0] == "meta"

def test_cross_entropy_by_hand():
    probabilities = torch.tensor([[[[0.6, 0.3]], [[0.2, 0.5]], [[0.2, 0.2]]]])  # of two pixels
    loss = unet.loss_fn(probabilities.log(), torch.tensor([[[0, 1]]]))
    assert loss.item() == pytest.approx((-math.log(0.6) - math.log(0.5)) / 2)

def test_iou_and_dice_by_hand():
    """nn.Identity gives an image back as its logits, so it predicts 0 for red and 1 for green."""
    scores = unet.evaluate(nn.Identity(), [(an_image("0110"), a_mask("1100"))])
    assert scores["IoU pet"] == pytest.approx(1 / 3)  # one of the pixels 1, 3 and 4
    assert scores["IoU background"] == pytest.approx(1 / 3)  # one of the pixels 1, 2 and 3
    assert math.isnan(scores["IoU border"])  # it is nowhere, and in no mean
    assert scores["mIoU"] == pytest.approx(1 / 3)
    assert scores["Dice"] == pytest.approx(2 / 4)

def test_pixels_and_losses_count_equally_in_every_batch():
    """Nine images of one pixel make a batch of eight and a batch of one."""
    pairs = zip("000000122", "000000012")  # predictions and masks
    dataset = [(an_image(prediction), a_mask(mask)) for prediction, mask in pairs]
    scores = unet.evaluate(nn.Identity(), dataset)
    losses = [unet.evaluate(nn.Identity(), [sample])["loss"] for sample in dataset]
    assert scores["mIoU"] == pytest.approx((6 / 7 + 0 / 2 + 1 / 2) / 3)
    assert scores["Dice"] == pytest.approx((12 / 13 + 0 / 2 + 2 / 3) / 3)
    assert scores["loss"] == pytest.approx(sum(losses) / 9)

def test_evaluate_switches_off_dropout():
    dataset = [(an_image("012210"), a_mask("012210"))]  # training would drop 9 of 10 logits
    assert unet.evaluate(nn.Dropout(0.9).train(), dataset)["mIoU"] == 1

def test_gradients_do_not_pile_up():
    """The mean of the logits has the same gradient in each step, so equal steps follow."""
    unet.loss_fn = lambda logits, masks: logits.mean()
    net, weights = nn.Conv2d(3, 3, 1), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        weights.append(net.weight.detach().clone())
        unet.train_epoch(net, [batch(TOYS[:2])], optimizer, Mock())
    torch.testing.assert_close(weights[2] - weights[1], weights[1] - weights[0])
    assert not torch.equal(weights[0], weights[1])

def test_an_epoch_is_in_training_mode_and_returns_the_mean_loss():
    losses = [torch.tensor(value, requires_grad=True) for value in (1.0, 4.0)]
    unet.loss_fn, net = Mock(side_effect=losses), unet.UNet(base=2).eval()
    assert unet.train_epoch(net, [batch(TOYS[:2])] * 2, Mock(), Mock()) == 2.5
    assert net.training

def test_the_learning_rate_rises_to_lr_and_falls_almost_to_0():
    rates = []
    hook = register_optimizer_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    unet.train("toy", epochs=4, batch_size=60, size=32, base=2, lr=0.02)
    hook.remove()
    top = rates.index(max(rates))
    assert (len(rates), rates[top]) == (4 * 240 / 60, pytest.approx(0.02, rel=0.1))
    assert 0 < top < 8  # in the first half
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert max(rates[0], rates[-1]) < 0.002  # a tenth of lr

def test_overfits_one_batch():
    net, (images, masks) = unet.UNet(base=8), batch(TOYS[:4])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        loss = unet.train_epoch(net, [(images, masks)], optimizer, Mock())
    assert loss < 0.1

@pytest.fixture
def no_steps(monkeypatch):
    """`train` on ten images of 0, 20, ... 180, but without any step or score."""
    pairs = [(Image.new("RGB", (9, 9), (20 * k,) * 3), TOYS[k][1]) for k in range(10)]
    monkeypatch.setattr(unet, "open_pairs", lambda data, split: {"trainval": pairs}[split])
    monkeypatch.setattr(unet, "train_epoch", Mock(return_value=1.0))
    monkeypatch.setattr(unet, "evaluate", Mock(return_value={"loss": 1.0, "mIoU": 0.5}))

def greys(dataset):
    return [image[0, 0, 0].item() for image, mask in dataset]

def test_validation_images_are_never_learned(no_steps):
    unet.train(size=32, base=2)
    learned = greys(unet.train_epoch.call_args.args[1].dataset)
    validated = greys(unet.evaluate.call_args.args[1])
    assert sorted(learned + validated) == list(range(0, 200, 20))

def test_each_seed_validates_the_same_images_with_other_weights(no_steps):
    for seed in (1, 2):
        unet.train(size=32, base=2, epochs=1, seed=seed)
    (net1, val_set1), (net2, val_set2) = [call.args for call in unet.evaluate.call_args_list]
    assert greys(val_set1) == greys(val_set2)
    assert greys(val_set1) not in ([0, 20], [160, 180])  # the list is shuffled
    assert not torch.equal(net1.final.weight, net2.final.weight)

def test_training_images_are_mirrored_and_shuffled(no_steps):
    unet.train(size=32, base=2)
    loader, val_set = unet.train_epoch.call_args.args[1], unet.evaluate.call_args.args[1]
    assert (loader.dataset.mirror, val_set.mirror) == (True, False)
    orders = [next(iter(loader))[0][:, 0, 0, 0].tolist() for _ in range(5)]
    assert orders.count(orders[0]) < 5

def test_the_history_has_a_row_for_each_epoch(no_steps):
    unet.train(size=32, base=2, epochs=2)
    assert torch.load("unet.pt")["history"] == 2 * [{"train loss": 1, "val loss": 1, "mIoU": 0.5}]

@pytest.mark.parametrize("wrong, told", [({"data": "few"}, "few.*4.*5"),
    ({"size": 100}, "16.*100"), ({"size": 16}, "16.*32.*16"), ({"size": 0}, "16.*0")])
def test_what_cannot_be_trained_is_refused_at_once(wrong, told, no_steps):
    unet.open_pairs = lambda data, split: [None] * 4  # too few, and no images
    pytest.raises(ValueError, unet.train, **wrong).match(told)

@pytest.mark.parametrize("train_loss, val_loss", [(math.nan, 1), (1, math.nan), (1, math.inf)])
def test_a_loss_that_is_not_finite_keeps_the_old_checkpoint(train_loss, val_loss, no_steps):
    Path("unet.pt").write_text("precious")
    unet.train_epoch.return_value, unet.evaluate.return_value["loss"] = train_loss, val_loss
    pytest.raises(ValueError, unet.train, size=32, base=2).match("lr")
    assert Path("unet.pt").read_text() == "precious"

def test_a_half_written_checkpoint_replaces_nothing():
    Path("unet.pt").write_text("precious")
    pytest.raises(TypeError, unet.save, "unet.pt", unet.UNet(base=2), history=(k for k in "ab"))
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
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch sprung'\ntR.")  # os.system("touch sprung")
    pytest.raises(Exception, unet.load, "evil.pt").match("weights_only")

def test_the_shell_and_a_call_train_the_same_network():
    call = ("import unet; unet.train(data='toy', checkpoint='a/1.pt', epochs=1, batch_size=60, "
            "size=48, base=2, lr=0.01, seed=3)")
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
    figure, datasets = unet.Figure(layout="constrained"), Mock(wraps=unet.PetDataset)
    monkeypatch.setattr(unet, "Figure", Mock(return_value=figure))
    monkeypatch.setattr(unet, "PetDataset", datasets)
    unet.show(checkpoint=trained)
    assert trained.with_suffix(".png").exists()
    assert len(datasets.call_args.args[0]) == 6  # no other image is decoded
    images, masks = batch(unet.open_pairs("toy", "test")[::50])  # 6 of 300
    saved, net = unet.load(trained)
    predictions = unet.compute_logits(net, images).argmax(dim=1)
    rows = images.movedim(1, -1), unet.COLOURS[masks], unet.COLOURS[predictions]
    wanted = unet.utils.make_grid(torch.cat(rows).movedim(-1, 1), nrow=6).movedim(0, -1)
    assert torch.equal(torch.tensor(figure.axes[0].images[0].get_array()), wanted)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[1].lines}
    assert lines["val loss"] == [row["val loss"] for row in saved["history"]]

def test_predict_draws_enlarged_logits_over_the_upright_photo(trained):
    photo, exif = TOYS[0][0], Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise, as the camera was held
    photo.transpose(Image.Transpose.ROTATE_90).convert("RGBA").save("a.b.png", exif=exif)
    shell(f"predict --checkpoint {trained} a.b.png")
    logits = unet.compute_logits(unet.load(trained)[1], batch(TOYS[:1])[0])
    classes = F.interpolate(logits, size=(160, 192), mode="bilinear").argmax(dim=1)[0]
    wanted = (unet.COLOURS[classes].float().movedim(-1, 0) + unet.pil_to_tensor(photo)) / 2
    drawn = unet.pil_to_tensor(Image.open("a.b-overlay.png"))
    assert (drawn - wanted).abs().max() <= 1  # it is rounded

def test_the_help_shows_the_defaults_of_the_function(capsys):
    pytest.raises(SystemExit, shell, "train --help")
    options = " ".join(capsys.readouterr().out.split()).split(" --")
    for name, parameter in inspect.signature(unet.train).parameters.items():
        text = [text for text in options if text.startswith(name.replace("_", "-") + " ")][-1]
        assert f"(default: {parameter.default}" in text

@pytest.mark.parametrize("words", ["", "train --epochs many", "test --epochs 1", "predict"])
def test_a_wrong_option_ends_in_usage(words):
    assert pytest.raises(SystemExit, shell, words).value.code == 2  # as argparse ends

@pytest.mark.parametrize("words, told", [
    ("test", "unet.pt.*train"), ("test --checkpoint t.pt --data nowhere", "nowhere.*train"),
    ("predict none.jpg --checkpoint t.pt", "none.jpg"), ("train", "no route.*toy"),
    ("predict --checkpoint t.pt no.jpg", "no.jpg"), ("predict --checkpoint t.pt a.png", "bomb")])
def test_an_error_ends_in_one_line(words, told, trained, monkeypatch):
    Path("t.pt").write_bytes(trained.read_bytes())
    Path("no.jpg").write_text("no image")
    Image.new("1", (20_000, 10_000)).save("a.png")
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=unet.URLError("no route")))
    pytest.raises(SystemExit, shell, words).match(rf"\A\s*.*{told}.*\Z")
