"""Tests of unet.py, and a second explanation of it. Five to read first: test_the_network_is_the_tutorials,
test_every_shape_on_the_page_is_the_real_one, test_each_skip_matters, test_dice_loss_by_hand, and
test_overfits_one_batch. The tutorials end with exercises: test_exercise_... are the answers."""
import inspect, itertools, math, os, re, runpy, subprocess, sys
from pathlib import Path
from statistics import mean
from unittest.mock import Mock
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, random_split
from torchvision.transforms.functional import pil_to_tensor
import unet

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
SEED = 0  # any other does as well
DRAWINGS = [unet.draw_pair(k) for k in range(10)]
TINY = "--size 32 --base 2 --batch-size 4"  # less than a second an epoch

@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """Every test works on the CPU, in float32, in an empty folder of its own."""
    for name, value in (("DEVICE", torch.device("cpu")), ("LAYOUT", torch.channels_last), ("BF16", False)):
        monkeypatch.setattr(unet, name, value)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(SEED)

@pytest.fixture
def trained(made=[]):
    """toy.pt, the checkpoint of a small network that has learned the toy drawings (once)."""
    if not made:
        run(f"train --data toy --epochs 3 --size 32 --base 8 --seed {SEED} --checkpoint toy.pt")
        made.append(Path("toy.pt").read_bytes())
    Path("toy.pt").write_bytes(made[0])

def run(words):
    unet.main(words.split())

def fails(words, *parts):
    """The command must end with one line that has all the parts."""
    with pytest.raises(SystemExit) as stop:
        run(words)
    line = str(stop.value.code).strip()
    assert "\n" not in line and all(part in line for part in parts), line

def write_pets(trainval=10, test=4, draw=unet.draw_pair):
    """A dataset in the official layout: draw(k) gives photo and trimap k, counted over both lists."""
    folder, number = Path("data/oxford-iiit-pet"), itertools.count()
    for name in ("images", "annotations/trimaps"):
        (folder / name).mkdir(parents=True)
    for split, count in (("trainval", trainval), ("test", test)):
        names = [f"{'Abyssinian' if k < count / 2 else 'beagle'}_{split}{k}" for k in range(count)]
        for name in names:
            photo, trimap = draw(next(number))
            photo.save(folder / f"images/{name}.jpg", quality=95)
            trimap.save(folder / f"annotations/trimaps/{name}.png")
        (folder / f"annotations/{split}.txt").write_text("".join(f"{name} 1 1 1\n" for name in names))
    return folder

def batch(pairs, size):
    """Photos (N, 3, size, size) and masks (N, size, size), as network and losses take them."""
    photos, masks = zip(*unet.PetDataset(pairs, size))
    return torch.stack(photos) / 255, torch.stack(masks).long()

def learn(net, x, target, loss_fn, steps):
    """Adam on one batch; how much of the loss is left."""
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=0.01), []
    for _ in range(steps):
        losses.append(loss_fn(net(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return (losses[-1] / losses[0]).item()

@pytest.mark.parametrize("in_channels, classes, base, size", [(3, 3, 64, 16), (1, 10, 8, 48)])
def test_the_network_is_the_tutorials(in_channels, classes, base, size):
    """The tutorials' network, from their words and with the page's weights. BatchNorm only adds its bias."""
    net, x = unet.UNet(in_channels, classes, base).eval(), torch.randn(2, in_channels, size, size + 16)
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.constant_(norm.weight, math.sqrt(1 + norm.eps))
        nn.init.normal_(norm.bias)
    def block(name, x):
        conv1, norm1, _, conv2, norm2, _ = net.get_submodule(name)
        x = F.conv2d(x, conv1.weight, norm1.bias, padding=1).relu()
        return F.conv2d(x, conv2.weight, norm2.bias, padding=1).relu()
    kept = [block("enc1", x)]
    for name in ("enc2", "enc3", "enc4", "bottleneck"):
        kept.append(block(name, F.max_pool2d(kept[-1], 2)))
    y = kept.pop()
    for level in "4321":
        up = net.get_submodule("up" + level)
        y = F.conv_transpose2d(y, up.weight, up.bias, stride=2)
        y = block("dec" + level, torch.cat((y, kept.pop()), 1))
    torch.testing.assert_close(net(x), F.conv2d(y, net.final.weight, net.final.bias))
    tutorials = sum(p.numel() for p in net.parameters()) - sum(norm.weight.numel() for norm in norms)
    assert base != 64 or tutorials == 31_031_875  # the tutorials' count: biases, no scales

def test_every_shape_on_the_page_is_the_real_one():
    """Run each commented line of UNet.forward by itself: do its comment and the drawing tell its shape?"""
    source, comment = inspect.getsource(unet.UNet.forward), r" +# \(N, +(\d+), +(\d+), +(\d+)\)"
    lines = re.findall(r"^ *(?:(\w+) =|(return)) (.+?)" + comment, source, re.M)
    values = {"self": unet.UNet().eval(), "torch": torch, "x": torch.zeros(2, 3, 128, 128)}
    drawn = re.findall(r"(\w+) +\((\d+), (\d+), (\d+)\)", unet.__doc__)
    assert len(lines) == 18 and len(drawn) == 11 and re.search(r"self, x\):" + comment, source)[1] == "3"
    for name, last, expression, *shape in lines:
        values[name or last] = eval(expression, values)
        assert values[name or last].shape == (2, *map(int, shape)), expression
    short = {"photo": "x", "logits": "return", "bottleneck": "b"}  # enc1 is e1, dec1 is d1
    for name, *shape in drawn:
        assert values[short.get(name, name[0] + name[-1])].shape == (2, *map(int, shape)), name

@pytest.mark.parametrize("skips", [True, False])
def test_each_skip_matters(skips, monkeypatch):
    """Zeros for the encoder's features of one level change the output, unless they are zeros anyway."""
    net, x, cat = unet.UNet(base=4, skips=skips).eval(), torch.randn(1, 3, 32, 32), torch.cat
    whole = net(x)
    for size in (4, 8, 16, 32):
        monkeypatch.setattr(torch, "cat", lambda p, dim: cat((p[0], p[1] * (p[1].shape[-1] != size)), dim))
        assert torch.equal(net(x), whole) == (not skips)

def test_he_initialisation():
    net = unet.UNet()
    for layer, variance in ((net.enc2[0], 2 / (9 * 64)), (net.final, 2 / 64), (net.up4, 1 / 1024)):
        noise = math.sqrt(2 / layer.weight.numel())
        assert layer.weight.var().item() == pytest.approx(variance, rel=5 * noise)

def test_compute_logits_scales_bytes_and_uses_the_fast_kernels(monkeypatch):
    net, seen, photos = unet.UNet(base=2).eval(), [], torch.randint(0, 256, (2, 3, 32, 32)).byte()
    torch.testing.assert_close(unet.compute_logits(net, photos), net(photos.float() / 255))
    net.enc2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    monkeypatch.setattr(unet, "BF16", True)
    assert unet.compute_logits(net, photos).dtype == torch.float32 and seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)

def test_exercise_gray_photos_and_ten_classes():
    net, x = unet.UNet(in_channels=1, out_classes=10, base=4), torch.rand(2, 1, 32, 32)
    assert learn(net, x, torch.randint(0, 10, (2, 32, 32)), unet.LOSSES["ce"], 15) < 0.9

def test_exercise_a_transposed_convolution_is_a_convolution_over_inserted_zeros():
    up, x = unet.UNet(base=2).up1, torch.randn(1, 4, 5, 7)
    spread = torch.zeros(1, 4, 10, 14)
    spread[:, :, ::2, ::2] = x
    kernel = up.weight.transpose(0, 1).flip(2, 3)  # (out, in, 2, 2), turned by half a turn
    torch.testing.assert_close(up(x), F.conv2d(F.pad(spread, (1, 0, 1, 0)), kernel, up.bias))

def test_exercise_shape_table():
    """For base 32 at 256 x 256, as one tutorial has it. Meta tensors have shapes but no values."""
    table = {}
    with torch.device("meta"):
        net = unet.UNet(base=32).eval()
        for name, module in net.named_children():
            module.register_forward_hook(lambda module, inputs, output, name=name: table.update(
                {name: (*inputs[0].shape[1:], *output.shape[1:])}))
        net(torch.empty(1, 3, 256, 256))
    assert table["enc1"] == (3, 256, 256, 32, 256, 256) and table["bottleneck"] == (256, 16, 16, 512, 16, 16)
    assert table["up4"] == (512, 16, 16, 256, 32, 32) and table["dec4"] == (512, 32, 32, 256, 32, 32)

def test_exercise_three_levels():
    """A U-Net is a level around a smaller U-Net, the smallest a block. Two poolings make 9 of 36 pixels."""
    class Level(nn.Module):
        def __init__(self, i, o, inner):
            super().__init__()
            self.enc, self.inner, self.dec = unet.conv_block(i, o), inner, unet.conv_block(o + o, o)
            self.up = nn.ConvTranspose2d(2 * o, o, 2, stride=2)
        def forward(self, x):
            e = self.enc(x)
            return self.dec(torch.cat((self.up(self.inner(F.max_pool2d(e, 2))), e), dim=1))
    net = nn.Sequential(Level(3, 8, Level(8, 16, unet.conv_block(16, 32))), nn.Conv2d(8, 3, 1))
    assert learn(net, *batch(DRAWINGS[:4], 36), unet.LOSSES["ce"], 30) < 0.5

def test_exercise_skips_by_addition(monkeypatch):
    """A sum has half the channels of a stack, so the decoder's blocks start with half as many."""
    net = unet.UNet(base=8)
    net.dec4, net.dec3, net.dec2, net.dec1 = (unet.conv_block(width, width) for width in (64, 32, 16, 8))
    monkeypatch.setattr(torch, "cat", lambda pair, dim: pair[0] + pair[1])
    assert learn(net, *batch(DRAWINGS[:4], 32), unet.LOSSES["ce"], 30) < 0.5

def test_exercise_dropout_at_the_end_of_the_encoder():
    """As in section 3.1 of the paper; it acts in training mode only."""
    net, x = unet.UNet(base=4), torch.randn(2, 3, 32, 32)
    net.enc4.append(nn.Dropout(0.5))
    net.bottleneck.append(nn.Dropout(0.5))
    assert not torch.equal(net(x), net(x)) and torch.equal(net.eval()(x), net(x))

def test_dice_loss_by_hand():
    """Two photos of two pixels, counted together. Class 0: probabilities of 2.4 in all, two true pixels."""
    p, target = torch.tensor([[[0.9, 0.7]], [[0.5, 0.3]]]), torch.tensor([[[0, 1]], [[0, 1]]])  # p of class 0
    dice0, dice1 = (2 * (0.9 + 0.5) + 1) / (2.4 + 2 + 1), (2 * (0.3 + 0.7) + 1) / (1.6 + 2 + 1)
    loss = unet.dice_loss(torch.stack((p, 1 - p), dim=1).log(), target)
    assert loss.item() == pytest.approx(1 - (dice0 + dice1) / 2, abs=1e-6)

def test_losses_by_hand():
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    pixels = zip(logits.movedim(1, -1).reshape(-1, 3).tolist(), target.flatten().tolist())
    ce = mean(math.log(sum(map(math.exp, z))) - z[c] for z, c in pixels)
    dice = unet.dice_loss(logits, target).item()
    got = {name: loss_fn(logits, target).item() for name, loss_fn in unet.LOSSES.items()}
    assert got == pytest.approx({"ce": ce, "dice": dice, "ce+dice": ce + dice})

def iou_and_dice(true, predicted):
    pixels = lambda classes, c: {i for i, value in enumerate(classes.flatten().tolist()) if value == c}
    pairs = [(pixels(true, c), pixels(predicted, c)) for c in range(3)]
    return [len(a & b) / len(a | b) for a, b in pairs], [2 * len(a & b) / (len(a) + len(b)) for a, b in pairs]

def test_evaluate_counts_every_pixel_once_in_eval_mode(monkeypatch):
    net, (x, target), seen, metrics = unet.UNet(base=4), batch(DRAWINGS, 32), [], unet.metrics
    learn(net, x, target, unet.LOSSES["ce"], 20)
    monkeypatch.setattr(unet, "metrics", lambda confusion: seen.append(confusion) or metrics(confusion))
    loss_fn = lambda logits, target: None if logits.requires_grad else unet.dice_loss(logits, target)
    loss, scores = unet.evaluate(net.train(), unet.PetDataset(DRAWINGS, 32), loss_fn)
    logits = net.eval()(x).detach()
    iou, dice = iou_and_dice(target, logits.argmax(dim=1))
    of_batches = 0.8 * loss_fn(logits[:8], target[:8]) + 0.2 * loss_fn(logits[8:], target[8:])
    assert loss == pytest.approx(of_batches.item(), rel=1e-4)
    assert scores == pytest.approx({"mIoU": mean(iou), "Dice": mean(dice), **dict(zip(unet.CLASSES, iou))})
    assert seen[0].dtype == torch.int64 and torch.equal(seen[0].sum(dim=1), target.flatten().bincount())

def test_a_class_in_neither_truth_nor_prediction_does_not_count():
    scores = unet.metrics(torch.tensor([[6, 2, 0], [4, 8, 0], [0, 0, 0]]))
    assert math.isnan(scores["border"]) and scores["mIoU"] == pytest.approx((6 / 12 + 8 / 14) / 2)
    assert scores["Dice"] == pytest.approx((12 / 18 + 16 / 22) / 2)

def test_exercise_class_weights():
    """A weight of 1 / (its pixels) for each class gives all classes the same say, however small they are."""
    logits, target = torch.randn(2, 3, 8, 8), torch.tensor([8.0, 1, 1]).multinomial(128, True).view(2, 8, 8)
    weighted = nn.CrossEntropyLoss(weight=1 / target.flatten().bincount(minlength=3))(logits, target)
    pixels = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(weighted, sum(pixels[target == c].mean() for c in range(3)) / 3)

def test_exercise_one_class_out():
    """Cell or no cell: one channel in, one out; a logit above 0, a probability above 1/2, means yes."""
    def dice_loss(logits, target):
        p = logits.sigmoid()
        return 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    for loss_fn in (F.binary_cross_entropy_with_logits, dice_loss):
        target = (torch.rand(2, 1, 4, 4) > 0.5).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
        net = unet.UNet(in_channels=1, out_classes=1, base=4)
        learn(net, target + 0.1 * torch.randn_like(target), target, loss_fn, 60)
        assert ((net(target) > 0) == (target > 0.5)).float().mean() > 0.95

def test_exercise_soft_iou():
    """Intersection over union as a loss, of probabilities. On certain answers it is the IoU of metrics."""
    def iou_loss(logits, target):
        p, t = logits.softmax(dim=1), F.one_hot(target, logits.shape[1]).movedim(-1, 1)
        shared = (p * t).sum((0, 2, 3))
        return 1 - (shared / ((p + t).sum((0, 2, 3)) - shared)).mean()
    true, predicted = torch.randint(0, 3, (2, 2, 8, 8))
    loss = iou_loss(60.0 * F.one_hot(predicted, 3).movedim(-1, 1), true).item()
    assert loss == pytest.approx(1 - mean(iou_and_dice(true, predicted)[0]), abs=1e-5)
    assert learn(unet.UNet(base=8), *batch(DRAWINGS[:4], 32), iou_loss, 40) < 0.7

def test_overfits_one_batch():
    """The first thing to try with any network: it must be able to learn four photos by heart."""
    net, (x, target) = unet.UNet(base=8), batch(DRAWINGS[:4], 32)
    learn(net, x, target, unet.LOSSES["ce"], 150)
    assert mean(iou_and_dice(target, net(x).argmax(dim=1))[0]) > 0.95

def test_exercise_a_longer_run_lowers_the_loss(trained):
    first, _, last = torch.load("toy.pt")["history"]
    assert last["train loss"] < 0.5 * first["train loss"] and last["mIoU"] > 0.55  # all background has 0.27

def test_a_sample_is_a_square_of_bytes_with_blended_colours_and_old_labels():
    """Black beside white gives grey. Pet (1) beside border (3): a mean of them would be background (2)."""
    photo = Image.frombytes("L", (192, 64), bytes((0, 255, 255)) * 64 * 64).convert("RGB")
    trimap = Image.frombytes("L", (192, 64), bytes((1, 3, 3)) * 64 * 64)
    photo, mask = unet.PetDataset([(photo, trimap)], 128)[0]
    assert photo.shape == (3, 128, 128) and len(photo.unique()) > 2
    assert mask.shape == (128, 128) and [list(unet.CLASSES)[c] for c in mask.unique()] == ["pet", "border"]
    assert photo.untyped_storage().nbytes() + mask.untyped_storage().nbytes() == 64 * 1024

def test_mirroring_turns_photo_and_mask_together_half_of_the_time():
    plain, mirrored = unet.PetDataset(DRAWINGS, 32), unet.PetDataset(DRAWINGS, 32, mirror=True)
    (photo, mask), seen = plain[0], [mirrored[0] for _ in range(100)]
    turned = sum(torch.equal(a, photo.flip(-1)) and torch.equal(b, mask.flip(-1)) for a, b in seen)
    kept = sum(torch.equal(a, photo) and torch.equal(b, mask) for a, b in seen)
    assert kept + turned == 100 and 25 < turned < 75 and torch.equal(plain[0][0], photo)

def test_training_and_validation_share_no_photo_and_every_breed(monkeypatch):
    """Photo k is grey level 4 k; the list has photos 0 to 19 of one breed, then 20 to 39 of another."""
    write_pets(40, 8, lambda k: (Image.new("RGB", (8, 8), (4 * k,) * 3), Image.new("L", (8, 8), 2)))
    seen, real = [], unet.PetDataset
    def spy(pairs, size, mirror=False):
        seen.append((mirror, {round(photo.getpixel((0, 0))[0] / 4) for photo, _ in pairs}))
        return real(pairs, size, mirror)
    monkeypatch.setattr(unet, "PetDataset", spy)
    for command in (f"train --epochs 1 --seed 1 {TINY}", f"train --epochs 1 --seed 2 {TINY}", "test"):
        run(command)
    (_, train), (_, val), *again, test = seen
    assert train | val == set(range(40)) and len(train) == 32 and len(val) == 8 and min(val) < 20 <= max(val)
    assert seen[:2] == again == [(True, train), (False, val)] and test == (False, set(range(40, 48)))

def test_toy_drawings_are_pairs_and_those_of_the_test_are_others():
    trainval, test = unet.open_pairs("toy", "trainval"), unet.open_pairs("toy", "test")
    assert unet.open_pairs("toy", "test")[0][0].tobytes() == test[0][0].tobytes()  # the same in every run
    assert len({photo.tobytes() for photo, _ in trainval + test}) == len(trainval + test) == 600
    for photo, trimap in trainval[:20]:
        photo, trimap = pil_to_tensor(photo), pil_to_tensor(trimap)[0]
        assert trimap.unique().tolist() == [1, 2, 3] and len(photo[:, trimap == 2].unique(dim=1)[0]) == 1

@pytest.mark.parametrize("loss, lr, base, size, epochs, batch, seed, skips", [
    ("ce", 4e-3, 2, 32, 5, 4, 7, True), ("ce+dice", 1e-2, 3, 48, 10, 8, 8, False)])
def test_train_is_the_textbook_loop(loss, lr, base, size, epochs, batch, seed, skips):
    """The same ten steps written again. The learning rate rises from lr / 25 for 30 % of them, then falls."""
    write_pets()
    run(f"train --loss {loss} --lr {lr} --base {base} --size {size} --epochs {epochs} --batch-size {batch} "
        f"--seed {seed}" + " --no-skips" * (not skips))
    parts = random_split(unet.open_pairs("data", "trainval"), (0.8, 0.2), torch.Generator().manual_seed(0))
    train_set, val_set = unet.PetDataset(parts[0], size, mirror=True), unet.PetDataset(parts[1], size)
    torch.manual_seed(seed)
    net, loss_fn, saved = unet.UNet(3, 3, base, skips), unet.LOSSES[loss], torch.load("unet.pt")
    optimizer = torch.optim.AdamW(net.to(memory_format=unet.LAYOUT).parameters(), betas=(0.5, 0.99))
    rates = iter([lr / 25, lr * 13 / 25, lr] + [lr + (lr / 25e4 - lr) * k / 7 for k in range(1, 8)])
    for row in saved["history"]:
        losses = []
        for photos, masks in DataLoader(train_set, batch, shuffle=True):
            optimizer.param_groups[0]["lr"] = next(rates)
            losses.append(loss_fn(unet.compute_logits(net.train(), photos), masks.long()))
            net.zero_grad()
            losses[-1].backward()
            optimizer.step()
        val_loss, scores = unet.evaluate(net, val_set, loss_fn)
        wanted = {"train loss": torch.stack(losses).mean().item(), "val loss": val_loss, **scores}
        assert row == pytest.approx(wanted, rel=1e-3, nan_ok=True)
    torch.testing.assert_close(dict(saved["model"]), dict(net.state_dict()), rtol=1e-4, atol=1e-6)

def test_the_checkpoint_is_plain_repeatable_and_gives_the_network_back():
    write_pets()
    for name in ("a.pt", "b.pt"):
        run(f"train --epochs 1 --no-skips --loss dice {TINY} --checkpoint runs/new/{name}")
    a, b = (torch.load(f"runs/new/{name}", weights_only=True) for name in ("a.pt", "b.pt"))  # runs no code
    assert all(torch.equal(value, b["model"][name]) for name, value in a.pop("model").items())
    config = {"in_channels": 3, "out_classes": 3, "base": 2, "skips": False}
    assert a == {"config": config, "size": 32, "loss": "dice", "history": b["history"]}
    assert len(b["history"]) == 1 and sorted(os.listdir("runs/new")) == ["a.pt", "b.pt"]
    net, loaded, x = unet.UNet(**config), unet.load_checkpoint("runs/new/a.pt")[1], torch.rand(1, 3, 32, 32)
    net.load_state_dict(b["model"])
    assert torch.equal(loaded(x), net.eval()(x)) and not loaded(x).requires_grad

def test_the_defaults_are_the_documented_ones_and_ctrl_c_stops(monkeypatch):
    monkeypatch.setattr(unet, "train", Mock(__name__="train", __doc__="fake", side_effect=KeyboardInterrupt))
    fails("train", "stopped")
    assert vars(unet.train.call_args.args[0]) == {
        "run": unet.train, "data": "data", "checkpoint": Path("unet.pt"), "epochs": 5, "batch_size": 8,
        "size": 128, "base": 64, "lr": 4e-3, "loss": "ce", "no_skips": False, "seed": 0}

def test_a_kill_while_saving_leaves_the_old_checkpoint(monkeypatch):
    write_pets()
    Path("unet.pt").write_text("precious")
    monkeypatch.setattr(torch, "save", lambda checkpoint, path: sys.exit(Path(path).write_bytes(b"half")))
    fails(f"train --epochs 1 {TINY}")
    assert Path("unet.pt").read_text() == "precious"

def test_progress_is_for_terminals_only(monkeypatch, capsys):
    write_pets()
    lines = r"decoding 8 photos\ndecoding 2 photos\nepoch 1  loss X  val loss X  mIoU X\nwrote unet.pt\n"
    for terminal, steps in ((False, []), (True, ["1", "2"])):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        run(f"train --epochs 1 {TINY}")
        out = re.sub(r"\d\.\d{3}", "X", capsys.readouterr().out)
        assert re.findall(r"step (\d) of 2  loss X\r", out) == steps  # \r: the next is written over it
        assert re.fullmatch(lines, re.sub(r"step[^\r]*\r", "", out))

@pytest.mark.parametrize("device, cuda, cpu, wanted", [(None, 1, 1, "cpu bf16"), (None, 1, 0, "cpu"),
    (None, 1, None, "cpu"), ("cuda", 1, 0, "cuda bf16"), ("cuda", 0, 1, "cuda"), ("mps", 0, 1, "mps")])
def test_device_and_bf16_follow_the_hardware(device, cuda, cpu, wanted, monkeypatch):
    find = lambda check_available=False: torch.device(device) if device and check_available else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", find)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **k: k.get("including_emulation", 1) or cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {} if cpu is None else {"avx512_bf16": cpu})
    fresh = runpy.run_path(str(HERE / "unet.py"))
    assert fresh["DEVICE"].type + " bf16" * bool(fresh["BF16"]) == wanted
    assert (fresh["LAYOUT"] == torch.channels_last) == (device != "mps")

def test_test_prints_loss_and_metrics_of_the_test_photos(trained, capsys):
    write_pets(test=7)
    torch.save({**torch.load("toy.pt"), "loss": "dice"}, "dice.pt")
    test_set, net = unet.PetDataset(unet.open_pairs("data", "test"), 32), unet.load_checkpoint("dice.pt")[1]
    loss, scores = unet.evaluate(net, test_set, unet.dice_loss)
    run("test --checkpoint dice.pt")
    wanted = "  ".join(f"{name} {value:.3f}" for name, value in {"loss": loss, **scores}.items())
    assert capsys.readouterr().out.endswith(f"decoding 7 photos\n{wanted}\n")

def test_show_draws_photos_truth_prediction_and_curves(trained, monkeypatch):
    write_pets(test=20)
    opened, pets, save = [], unet.datasets.OxfordIIITPet, Mock()
    getitem = pets.__getitem__
    monkeypatch.setattr(pets, "__getitem__", lambda self, i: opened.append(i) or getitem(self, i))
    monkeypatch.setattr(unet.Figure, "savefig", lambda self, path: save(self, path))
    run("show --checkpoint toy.pt")
    (figure, path), _ = save.call_args
    assert path == "toy.png" and 4 <= len(set(opened)) == len(opened) <= 6 and min(opened) < 10 <= max(opened)
    photos, truth = batch([getitem(unet.open_pairs("data", "test"), i) for i in opened], 32)
    prediction = unet.load_checkpoint("toy.pt")[1](photos).argmax(dim=1)
    assert 0.7 < (truth == prediction).float().mean() < 1  # it has learned, and errs
    *rows, curves = figure.axes
    pictures = (photos * 255).round().byte().movedim(1, -1), unet.COLOURS[truth], unet.COLOURS[prediction]
    for axis, name, row in zip(rows, ("input", "ground truth", "prediction"), pictures):
        grid = torch.as_tensor(axis.images[0].get_array())
        assert (axis.get_ylabel(), len(axis.get_xticks()), len(axis.get_yticks())) == (name, 0, 0)
        for k, picture in enumerate(row):
            assert torch.equal(grid[2:34, 2 + 34 * k:34 + 34 * k], picture)  # 2 pixels between pictures
    history, lines = torch.load("toy.pt")["history"], {line.get_label(): line for line in curves.lines}
    for name in ("train loss", "val loss", "mIoU"):
        assert lines[name].get_xydata().tolist() == [[i + 1, row[name]] for i, row in enumerate(history)]
    for name, rgb in unet.CLASSES.items():
        assert tuple(round(255 * value) for value in lines[name].get_color()) == rgb
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)
    assert curves.get_xlabel() == "epoch" and list(curves.get_xticks()) == [1, 2, 3]

def test_predict_resizes_logits_not_labels_and_draws_the_mask_over_the_upright_photo(trained, capsys):
    photo, exif = unet.draw_pair("a photo")[0], Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise, as the camera was held
    photo.transpose(Image.Transpose.ROTATE_90).convert("RGBA").save("caf\u00e9.c.png", exif=exif)
    run("predict caf\u00e9.c.png --checkpoint toy.pt")
    assert capsys.readouterr().out.endswith("wrote caf\u00e9.c-mask.png\n")
    small, _ = batch([(photo, Image.new("L", photo.size, 1))], 32)
    logits = F.interpolate(unet.load_checkpoint("toy.pt")[1](small), size=(160, 192), mode="bilinear")
    classes = logits.argmax(dim=1)[0]
    wanted = (unet.COLOURS[classes].movedim(-1, 0).float() + pil_to_tensor(photo)) / 2
    drawn = pil_to_tensor(Image.open("caf\u00e9.c-mask.png"))
    assert (drawn - wanted).abs().max() <= 1 and len(classes.unique()) > 1

def python(*words):
    Path("sitecustomize.py").write_text("import torch;torch.accelerator.current_accelerator=lambda **_: None")
    environment = {**os.environ, "PYTHONPATH": f".{os.pathsep}{HERE}", "CUDA_VISIBLE_DEVICES": ""}  # CPU only
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)

def test_a_stranger_runs_it():
    done = python(HERE / "unet.py", *f"train --data toy --epochs 1 {TINY}".split())
    assert done.returncode == 0 and done.stdout.endswith("wrote unet.pt\n"), done

def test_the_map_of_the_readme_names_the_right_lines():
    lines = (HERE / "unet.py").read_text(encoding="utf-8").splitlines()
    rows = re.findall(r"`unet\.py:(\d+)` \| `(.+?)` \|", README)
    assert len(rows) >= 10 and all(code in lines[int(number) - 1] for number, code in rows)

def test_several_gpus_train_one_network():
    """README's several.py, with two workers on the CPU: they share the photos, and end with equal weights."""
    script = next(text for text in re.findall(r"```python\n(.*?)```", README, re.S) if "Distributed" in text)
    script = script.replace("size, base, epochs = 128, 64, 5", "size, base, epochs = 32, 2, 2")
    spy = 'torch.save((list(loader.sampler), net.module.final.weight), f"{distributed.get_rank()}.pt")\n'
    Path("several.py").write_text(script.replace("distributed.destroy", spy + "distributed.destroy"))
    words = "-m torch.distributed.run --standalone --max-restarts=1 --nproc_per_node=2 several.py toy".split()
    done = python(*words)
    assert done.returncode == 0 and done.stdout.count("loss ") == 2, done
    (share0, weight0), (share1, weight1) = torch.load("0.pt"), torch.load("1.pt")
    assert sorted(share0 + share1) == list(range(300)) and torch.equal(weight0, weight1)
    assert torch.equal(torch.load("unet.pt")["model"]["final.weight"], weight0)

def test_options_out_of_range_stop_at_once(capsys):
    for words in ("size 100", "size 16", "epochs 0", "batch-size 0", "base 0", "lr 0", "lr nan", "lr 1.1"):
        fails(f"train --data toy --{words}", "--" + words.split()[0])
    fails("train --data toy --checkpoint .", "--checkpoint", "folder")
    assert not os.listdir() and not capsys.readouterr().out

def test_a_pair_that_is_not_usable_is_named(trained):
    folder = write_pets()
    photo, trimap = folder / "images/beagle_test3.jpg", folder / "annotations/trimaps/beagle_test3.png"
    for mode, size, label in (("L", (192, 160), 0), ("L", (192, 160), 4), ("1", (192, 160), 0),
                              ("RGB", (192, 160), (9, 9, 9)), ("L", (160, 192), 2)):
        Image.new(mode, size, label).save(trimap)
        fails("test --checkpoint toy.pt", "beagle_test3.png")
    for path in (trimap, photo):
        path.write_text("no picture")
        fails("test --checkpoint toy.pt", path.name)

def test_no_photos_and_no_network(trained, monkeypatch):
    test_list = write_pets() / "annotations/test.txt"
    test_list.write_text("")
    fails("test --checkpoint toy.pt", "too few photos")
    fails("show --checkpoint toy.pt", "too few photos")
    test_list.unlink()
    fails("test --checkpoint toy.pt", "test.txt", "--data toy")
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: 1 / 0)  # any trouble
    fails("train --data new", "zero", "images.tar.gz", "annotations.tar.gz", "new/oxford-iiit-pet", "toy")

@pytest.mark.parametrize("content", [None, b"text", b"cos\nsystem\n(S'touch sprung'\ntR."])  # an evil pickle
def test_what_is_no_checkpoint_or_no_photo_is_named(content, trained):
    unet.draw_pair("cat")[0].save("cat.jpg")
    for name in ("bad.pt", "bad.jpg") * (content is not None):
        Path(name).write_bytes(content)
    for command in ("test --data toy", "show --data toy", "predict cat.jpg"):
        fails(command + " --checkpoint bad.pt", "bad.pt")
    fails("predict bad.jpg --checkpoint toy.pt", "bad.jpg")
    torch.save({**torch.load("toy.pt"), "config": {"base": 4}}, "other.pt")
    fails("test --data toy --checkpoint other.pt", "other.pt")
    assert not {"sprung", "bad.png", "bad-mask.png", "cat-mask.png"} & set(os.listdir())

def test_a_loss_that_is_not_finite_stops_the_run_and_a_bug_keeps_its_traceback(monkeypatch):
    write_pets()
    monkeypatch.setitem(unet.LOSSES, "ce", lambda logits, target: logits.mean() * math.nan)
    fails(f"train --epochs 1 {TINY}", "not finite", "--lr")
    assert not Path("unet.pt").exists()
    monkeypatch.setitem(unet.LOSSES, "ce", lambda logits, target: nn.CrossEntropyLoss()(logits, target[0]))
    with pytest.raises(ValueError, match="batch_size"):
        run(f"train --epochs 1 {TINY}")
