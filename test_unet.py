"""Tests of unet.py, in its order, as a second explanation of it. Five to read first:
test_iou_and_dice_by_hand, test_mirroring_turns_image_and_mask_together,
test_a_decoder_block_gets_up_and_skip, test_gradients_do_not_pile_up, test_overfits_one_batch."""
import inspect, math, pickle, re, runpy, subprocess, sys
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pytest, torch, unet
from PIL import Image
from torch import nn
from torch.nn import functional as F

SEED = 0  # any other does as well
unet.DEVICE, unet.BF16 = torch.device("cpu"), False  # no test needs a GPU
torch.set_num_threads(1)  # most networks here are too small for a second one
TOYS = unet.open_pairs("toy", "test")

@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Each test starts from the same seed, in an empty folder. It may set these globals."""
    torch.manual_seed(SEED)
    monkeypatch.chdir(tmp_path)
    for name in "DEVICE BF16 Figure evaluate loss_fn open_pairs save train_epoch".split():
        monkeypatch.setattr(unet, name, getattr(unet, name))  # and undo it afterwards

@pytest.fixture(scope="module")
def toy_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "toy.pt"
    unet.train("toy", path, epochs=5, size=32, base=8, lr=3e-3, seed=SEED)
    return path.read_bytes()

@pytest.fixture
def trained(toy_checkpoint):
    Path("unet.pt").write_bytes(toy_checkpoint)

def shell(words):
    sys.argv = ["unet.py", *words.split()]
    unet.main()

def batch(pairs):
    return next(iter(unet.DataLoader(unet.PetDataset(pairs, 32), len(pairs))))

def test_the_test_split_is_read_from_its_list():
    Path("data/oxford-iiit-pet/images").mkdir(parents=True)
    Path("data/oxford-iiit-pet/annotations").mkdir()
    Path("data/oxford-iiit-pet/annotations/test.txt").write_text("cat_1 1 1 1\ncat_2 1 1 1\n")
    assert len(unet.open_pairs("data", "test")) == 2

def test_a_sample_is_an_image_of_bytes_and_a_mask_of_classes():
    dataset = unet.PetDataset(TOYS[:1], 128)
    image, mask = dataset[0]
    assert (image.shape, image.dtype) == ((3, 128, 128), torch.uint8)
    assert (mask.shape, mask.dtype) == ((128, 128), torch.int64)
    assert sum(part.nbytes for part in dataset.samples[0]) == 64 * 1024

def test_masks_are_resized_without_new_labels():
    trimap = Image.frombytes("L", (2, 1), bytes([1, 3]))  # pet beside border
    image, mask = unet.PetDataset([(trimap.convert("RGB"), trimap)], 3)[0]
    assert mask.unique().tolist() == [0, 2]  # their mean, 2, would be background

def forty_rows(mirror):
    """The first rows of 40 equal images, white beside black, and masks, pet beside border."""
    image = Image.frombytes("L", (2, 1), bytes([255, 0])).convert("RGB")
    trimap = Image.frombytes("L", (2, 1), bytes([1, 3]))
    dataset = unet.PetDataset(40 * [(image, trimap)], 2, mirror)
    return [(image[0, 0].tolist(), mask[0].tolist()) for image, mask in dataset]

def test_mirroring_turns_image_and_mask_together():
    unchanged, mirrored = ([255, 0], [0, 2]), ([0, 255], [2, 0])
    assert forty_rows(mirror=False) == 40 * [unchanged]
    rows = forty_rows(mirror=True)
    assert rows.count(unchanged) + rows.count(mirrored) == 40
    assert 5 < rows.count(mirrored) < 35

@pytest.mark.parametrize("mode, label", [("L", 0), ("L", 4), ("L", 255), ("I;16", 257)])
def test_a_label_without_a_class_is_refused(mode, label):
    Image.new(mode, (32, 32), label).save("trimap.png")  # as a byte, 257 would be 1
    pairs = [(TOYS[0][0], Image.open("trimap.png"))]
    pytest.raises(ValueError, unet.PetDataset, pairs, 32).match(rf"trimap\.png.*{label}.*3")

def test_a_missing_pair_is_an_error_and_not_the_end_of_the_list():
    pairs = torch.utils.data.Subset([], [0, 1, 2])  # it promises three, and has none
    pytest.raises(IndexError, unet.PetDataset, pairs, 32)

def unet_after(images, base):
    """A UNet that was run on images. Each part of it has kept what it got and what it made."""
    def keep(part, inputs, output):
        part.got, part.made = inputs[0], output
    net = unet.UNet(base=base)
    for part in net.children():
        part.register_forward_hook(keep)
    net(images)
    return net

def test_every_shape_comment_of_forward_is_true():
    net = unet_after(torch.zeros(1, 3, 128, 128), base=64)
    tensors = [net.enc1.got, net.enc1.made, net.enc2.made, net.enc3.made, net.enc4.made,
               net.bottleneck.made, net.up4.made, net.dec4.got, net.dec4.made,
               net.up3.made, net.dec3.got, net.dec3.made, net.up2.made, net.dec2.got,
               net.dec2.made, net.up1.made, net.dec1.got, net.dec1.made, net.final.made]
    comments = re.findall(r"# \(N, +(\d+), +(\d+), +(\d+)\)", inspect.getsource(net.forward))
    assert [[int(n) for n in shape] for shape in comments] == [[*x.shape[1:]] for x in tensors]

def test_a_block_is_convolution_batchnorm_relu_twice():
    block, x = unet.conv_block(3, 5), torch.randn(2, 3, 8, 8)
    y = F.batch_norm(F.conv2d(x, block[0].weight, padding=1), None, None, training=True).relu()
    y = F.batch_norm(F.conv2d(y, block[3].weight, padding=1), None, None, training=True).relu()
    torch.testing.assert_close(block(x), y)

def test_a_decoder_block_gets_up_and_skip():
    net = unet_after(torch.randn(1, 3, 32, 32), base=2)
    assert torch.equal(net.dec4.got, torch.cat((net.up4.made, net.enc4.made), dim=1))
    assert torch.equal(net.dec3.got, torch.cat((net.up3.made, net.enc3.made), dim=1))
    assert torch.equal(net.dec2.got, torch.cat((net.up2.made, net.enc2.made), dim=1))
    assert torch.equal(net.dec1.got, torch.cat((net.up1.made, net.enc1.made), dim=1))

def test_every_weight_takes_part():
    net = unet.UNet(base=2)
    net(torch.randn(1, 3, 32, 32)).sum().backward()
    assert [name for name, weight in net.named_parameters() if weight.grad is None] == []

@pytest.mark.parametrize("device, has_bf16", [
    ("cpu", True), ("cpu", False), ("cuda", True), ("cuda", False), ("mps", False)])
def test_bf16_follows_the_hardware(device, has_bf16, monkeypatch):
    found = None if device == "cpu" else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", Mock(return_value=found))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",  # any GPU can emulate it, slowly
                        lambda including_emulation=True: has_bf16 or including_emulation)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    values = runpy.run_path(unet.__file__)
    assert (values["DEVICE"].type, values["BF16"]) == (device, has_bf16)

@pytest.mark.filterwarnings("ignore:.*is a no-op")  # a meta tensor takes no saved values
@pytest.mark.parametrize("words", ["train --data toy --size 32", "test", "show", "predict cat.jpg"])
def test_a_command_has_its_tensors_on_the_device(words, trained, monkeypatch):
    """Meta tensors have no values. A command must fail at reading one, not at mixing devices."""
    TOYS[0][0].save("cat.jpg")
    unet.DEVICE = torch.device("meta")
    unet.loss_fn = Mock(return_value=torch.tensor(1.0, requires_grad=True))
    monkeypatch.setattr(torch, "autocast", MagicMock())
    pytest.raises(RuntimeError, shell, words).match("meta tensor")
    torch.autocast.assert_called_with("meta", torch.bfloat16, enabled=False)
    for call in unet.loss_fn.call_args_list:
        assert [tensor.device.type for tensor in call.args] == ["meta", "meta"]

def test_bfloat16_rounds_the_logits_a_little(trained):
    saved, net = unet.load("unet.pt")
    images, masks = batch(TOYS[:2])
    logits = unet.compute_logits(net, images)
    unet.BF16 = True
    rounded = unet.compute_logits(net, images)
    assert rounded.dtype == torch.float32
    assert 0.001 < (rounded - logits).abs().max() < 0.3  # the largest logits are about 3

def test_cross_entropy_by_hand():
    probabilities = torch.tensor([[0.6, 0.3], [0.2, 0.5], [0.2, 0.2]])  # 3 classes, 2 pixels
    logits = probabilities.log()  # softmax gives the probabilities back, as their sum is 1
    loss = unet.loss_fn(logits[None], torch.tensor([[0, 1]]))
    assert loss.item() == pytest.approx((-math.log(0.6) - math.log(0.5)) / 2)

def sample(prediction, mask):
    """A row of pixels and its mask. The network nn.Identity predicts red as 0, green 1, blue 2."""
    prediction = torch.tensor([[int(digit) for digit in prediction]])  # (1, W)
    image = 255 * F.one_hot(prediction, 3).movedim(-1, 0).byte()  # (3, 1, W)
    return image, torch.tensor([[int(digit) for digit in mask]])

def test_iou_and_dice_by_hand():
    scores = unet.evaluate(nn.Identity(), [sample(prediction="0110", mask="1100")])
    assert scores["IoU background"] == pytest.approx(1 / 3)  # pixel 2, of the pixels 1 to 3
    assert math.isnan(scores["IoU border"])  # it is nowhere, and in no mean
    assert scores["mIoU"] == pytest.approx(1 / 3)
    assert scores["Dice"] == pytest.approx(2 / 4)

def test_an_image_counts_the_same_in_a_batch_of_8_and_of_1():
    dataset = [sample(prediction, mask) for prediction, mask in zip("000000122", "000000012")]
    scores = unet.evaluate(nn.Identity(), dataset)
    losses = [unet.evaluate(nn.Identity(), [pair])["loss"] for pair in dataset]
    assert scores["mIoU"] == pytest.approx((6 / 7 + 0 / 2 + 1 / 2) / 3)
    assert scores["Dice"] == pytest.approx((12 / 13 + 0 / 2 + 2 / 3) / 3)
    assert scores["loss"] == pytest.approx(sum(losses) / 9)

def test_evaluate_is_not_in_training_mode():
    scores = unet.evaluate(nn.Dropout(0.9).train(), [sample("012210", "012210")])
    assert scores["mIoU"] == 1  # nothing was dropped

def test_gradients_do_not_pile_up():
    """The mean of the logits is linear in the weights, so all its gradients and steps are equal."""
    unet.loss_fn = lambda logits, masks: logits.mean()
    net, weights = nn.Conv2d(3, 3, 1), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = Mock(step=lambda: weights.append(net.weight.detach().clone()))  # after each move
    unet.train_epoch(net, 3 * [batch(TOYS[:2])], optimizer, schedule)
    torch.testing.assert_close(weights[2] - weights[1], weights[1] - weights[0])

def test_an_epoch_has_a_step_for_each_batch_and_returns_the_mean_loss():
    unet.loss_fn = Mock(side_effect=[torch.tensor(x, requires_grad=True) for x in (1.0, 4.0)])
    net, optimizer, schedule = unet.UNet(base=2).eval(), Mock(), Mock()
    assert unet.train_epoch(net, [batch(TOYS[:2])] * 2, optimizer, schedule) == 2.5
    assert net.training
    assert optimizer.step.call_count == schedule.step.call_count == 2

def test_overfits_one_batch():
    net, one_batch = unet.UNet(base=8), batch(TOYS[:4])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        loss = unet.train_epoch(net, [one_batch], optimizer, Mock())
    assert loss < 0.1

def test_a_half_written_checkpoint_replaces_nothing():
    Path("unet.pt").write_text("precious")
    pytest.raises(TypeError, unet.save, "unet.pt", unet.UNet(base=2), history=sys)  # unpicklable
    assert Path("unet.pt").read_text() == "precious"

def test_a_network_of_other_layers_is_not_loaded():
    unet.save("other.pt", nn.Conv2d(3, 3, 1), base=8)
    pytest.raises(RuntimeError, unet.load, "other.pt").match("enc1")

def test_a_pickle_that_would_run_a_command_is_refused():
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch sprung'\ntR.")  # os.system("touch sprung")
    pytest.raises(pickle.UnpicklingError, unet.load, "evil.pt")

def dry_run(train_loss=1.0, val_loss=1.0, **options):
    """Train on greys 0, 20, ... 180, but without steps. Return train_epoch's inputs and val_set."""
    pairs = [(Image.new("RGB", (9, 9), (20 * k,) * 3), TOYS[k][1]) for k in range(10)]
    unet.open_pairs = lambda data, split: pairs if split == "trainval" else None
    unet.train_epoch = Mock(return_value=train_loss)
    unet.evaluate = Mock(return_value={"loss": val_loss, "mIoU": 0.5})
    unet.train(size=32, base=2, **options)
    return *unet.train_epoch.call_args.args, unet.evaluate.call_args.args[1]

def greys(dataset):
    return [image[0, 0, 0].item() for image, mask in dataset]

def test_the_learning_rate_rises_to_lr_and_falls_almost_to_0():
    net, loader, optimizer, schedule, val_set = dry_run(epochs=5, batch_size=2, lr=0.02)
    rates = []
    for _ in range(5 * 8 // 2):  # epochs of 8 training images in batches of 2
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    assert rates[top] == pytest.approx(0.02)
    assert max(rates[0], rates[-1]) < 0.002

def test_validation_images_are_never_learned():
    net, loader, optimizer, schedule, val_set = dry_run()
    assert sorted(greys(loader.dataset) + greys(val_set)) == list(range(0, 200, 20))

def test_training_images_are_mirrored_and_shuffled():
    net, loader, optimizer, schedule, val_set = dry_run()
    assert (loader.dataset.mirror, val_set.mirror) == (True, False)
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)

def test_each_seed_validates_the_same_images_with_other_weights():
    net1, *_, val_set1 = dry_run(seed=1)
    net2, *_, val_set2 = dry_run(seed=2)
    assert greys(val_set1) == greys(val_set2)
    assert greys(val_set1) not in ([0, 20], [160, 180])  # not the first two or the last
    assert not torch.equal(net1.final.weight, net2.final.weight)

def test_each_epoch_is_saved_and_adds_to_the_history():
    unet.save = Mock()
    dry_run(train_loss=3.0, val_loss=2.0, epochs=2)
    assert unet.save.call_count == 2
    row = {"train loss": 3.0, "val loss": 2.0, "mIoU": 0.5}
    assert unet.save.call_args.kwargs["history"] == [row, row]

@pytest.mark.parametrize("option, told", [({"data": "few"}, "few.*4.*5"), ({"size": 40}, "16.*40")])
def test_what_cannot_be_trained_is_refused_at_once(option, told):
    unet.open_pairs = lambda data, split: [None] * 4  # too few, and no images
    pytest.raises(ValueError, unet.train, **option).match(told)

@pytest.mark.parametrize("train_loss, val_loss", [(math.nan, 1), (1, math.nan), (1, math.inf)])
def test_a_loss_that_is_not_finite_keeps_the_old_checkpoint(train_loss, val_loss):
    Path("unet.pt").write_text("precious")
    pytest.raises(ValueError, dry_run, train_loss, val_loss).match("lr")
    assert Path("unet.pt").read_text() == "precious"

def test_test_scores_the_data_of_the_checkpoint(trained, capsys):
    saved, net = unet.load("unet.pt")
    scores = unet.evaluate(net, unet.PetDataset(TOYS, 32))
    assert scores["mIoU"] > 0.8  # training has worked
    shell("test")
    printed = capsys.readouterr().out
    assert all(f"{name} {value:.3f}" in printed for name, value in scores.items())

def test_show_draws_images_masks_predictions_and_curves(trained):
    figure = unet.Figure(layout="constrained")
    unet.Figure = Mock(return_value=figure)
    unet.show(checkpoint=Path("unet.pt").rename("a.pt"))
    images, masks = batch(TOYS[::50])  # 6 of 300
    saved, net = unet.load("a.pt")
    predictions = unet.compute_logits(net, images).argmax(dim=1)
    grid = torch.tensor(figure.axes[0].images[0].get_array())
    assert grid.shape == (2 + 3 * 34, 2 + 6 * 34, 3)  # 32 pixels and a frame of 2
    for k in range(6):
        column = grid[:, 2 + 34 * k:34 + 34 * k]
        assert torch.equal(column[2:34], images[k].movedim(0, -1))
        assert torch.equal(column[36:68], unet.COLOURS[masks[k]])
        assert torch.equal(column[70:102], unet.COLOURS[predictions[k]])
    assert [*figure.axes[1].lines[-2].get_ydata()] == [row["val loss"] for row in saved["history"]]
    assert Path("a.png").exists()

def test_predict_draws_enlarged_logits_over_the_upright_photo(trained):
    photo, exif = TOYS[0][0], Image.Exif()
    exif[0x0112] = 6  # the tag of the orientation: turn it clockwise
    photo.transpose(Image.Transpose.ROTATE_90).convert("RGBA").save("a.b.png", exif=exif)
    shell("predict a.b.png")
    saved, net = unet.load("unet.pt")
    assert not net.training  # load calls eval
    logits = unet.compute_logits(net, batch(TOYS[:1])[0])
    classes = F.interpolate(logits, size=(160, 192), mode="bilinear").argmax(dim=1)[0]
    wanted = (unet.COLOURS[classes].float().movedim(-1, 0) + unet.pil_to_tensor(photo)) / 2
    drawn = unet.pil_to_tensor(Image.open("a.b-overlay.png"))
    assert (drawn - wanted).abs().max() <= 1  # it is rounded

def test_the_shell_and_a_call_train_the_same_network():
    unet.train("toy", "a/1.pt", epochs=2, batch_size=60, size=48, base=2, lr=0.1, seed=3)
    shell("train --data toy --epochs 2 --batch-size 60 --size 48 --base 2 --lr 0.1 --seed 3")
    one, two = torch.load("a/1.pt"), torch.load("unet.pt")
    torch.testing.assert_close(one.pop("model"), two.pop("model"))
    assert one == two
    assert (one["data"], one["size"], one["base"], len(one["history"])) == ("toy", 48, 2, 2)

def test_the_help_shows_the_defaults_of_the_function():
    printed = subprocess.check_output([sys.executable, unet.__file__, "train", "--help"], text=True)
    for name, parameter in inspect.signature(unet.train).parameters.items():
        assert re.search(rf"--{name[:5]}[^(]*\(default:\s+{parameter.default}[,)]", printed)

@pytest.mark.parametrize("words", ["", "train --epochs many", "test --epochs 1", "predict"])
def test_a_wrong_option_ends_in_usage(words):
    assert pytest.raises(SystemExit, shell, words).value.code == 2  # argparse's status

@pytest.mark.parametrize("words, told", [
    ("test --checkpoint none.pt", "none.pt.*train"), ("test --data nowhere", "nowhere.*train"),
    ("train", "no route.*toy"), ("predict none.jpg", "none.jpg"), ("predict unet.pt", "unet.pt")])
def test_an_error_of_a_file_or_the_internet_ends_in_one_line(words, told, trained, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=unet.URLError("no route")))
    pytest.raises(SystemExit, shell, words).match(rf"\A\s*.*{told}.*\Z")
