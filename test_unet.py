"""Tests of unet.py, in the order of its page: data, model, losses and scores, training, using it.

No download, no GPU, no files but those the tests make: `python -m pytest` takes a minute or two.
The exercises of the U-Net tutorials stand here too, as tests named test_exercise_...
"""
import ast
import contextlib
import copy
import inspect
import itertools
import math
import os
import pickle
import random
import re
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import unet

HERE = Path(__file__).parent
TINY = "--size 32 --base 2 --batch-size 4 --device cpu --precision fp32".split()  # a second an epoch


def make_pets(root, trainval=10, test=4, draw=unet.draw_pair):
    """A dataset in the official layout, of drawn photos: draw(number) gives a photo and a trimap."""
    folder = root / "oxford-iiit-pet"
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    (folder / "images").mkdir()
    numbers = iter(range(10**6))
    for split, count in (("trainval", trainval), ("test", test)):
        names = []
        for k in range(count):  # the first half of a list is one breed, the second half another
            names.append(f"{'Abyssinian' if k < count / 2 else 'beagle'}_{split}{k}")
            photo, trimap = draw(next(numbers))
            photo.save(folder / "images" / f"{names[-1]}.jpg", quality=95)
            trimap.save(folder / "annotations" / "trimaps" / f"{names[-1]}.png")
        rows = [f"{name} {1 + (name[0] == 'b')} 1 1\n" for name in names]
        (folder / "annotations" / f"{split}.txt").write_text("".join(rows))
    return root


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    """`--device auto` means the CPU in every test, so that all machines run the same."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A small dataset in the folder `data`, in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    make_pets(tmp_path / "data")
    return tmp_path / "data" / "oxford-iiit-pet"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint after two tiny epochs."""
    root = tmp_path_factory.mktemp("trained")
    make_pets(root)
    unet.main(["train", "--data", str(root), "--epochs", "2", "--checkpoint", str(root / "unet.pt"), *TINY])
    return root / "unet.pt"


def stacked(dataset):
    """All photos (N, 3, H, W) and all masks (N, H, W) of a dataset."""
    photos, masks = zip(*dataset)
    return torch.stack(photos), torch.stack(masks)


def fails(argv, capsys, *words):
    """Run a command that must fail with one short message containing all the words."""
    with pytest.raises(SystemExit) as stop:
        unet.main([str(word) for word in argv])
    message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    lines = [line for line in message.splitlines() if not line.startswith((" ", "usage:"))]
    assert stop.value.code not in (0, None) and len(lines) == 1, message
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
    return lines[0]


# ------------------------------------------- data -------------------------------------------------

def solid(label_of):
    """draw() for make_pets: grey photos of brightness 40 * label, in which pixel x has label_of(x)."""
    def draw(number):
        trimap = Image.new("L", (40, 30))
        trimap.putdata([label_of(x) for _ in range(30) for x in range(40)])
        return trimap.point(lambda label: 40 * label).convert("RGB"), trimap
    return draw


def test_labels_start_at_zero_and_resizing_makes_no_new_ones(tmp_path):
    make_pets(tmp_path, draw=solid(lambda x: 1 if x % 2 else 3))  # pet beside border, no background
    _, masks = stacked(unet.PetDataset(str(tmp_path), "test", 32))
    assert set(masks.unique().tolist()) == {0, 2}


def test_photo_and_mask_have_the_documented_types_and_match(tmp_path):
    make_pets(tmp_path, draw=solid(lambda x: 1 + x // 16))
    photo, mask = unet.PetDataset(str(tmp_path), "test", 32)[0]
    assert photo.shape == (3, 32, 32) and photo.dtype == torch.uint8
    assert mask.shape == (32, 32) and mask.dtype == torch.uint8
    inside = torch.tensor([2, 6, 16, 20, 29])  # columns away from the two edges, which the resizing blurs
    assert (photo[0, :, inside].int() - 40 * (mask[:, inside].int() + 1)).abs().max() <= 3


def test_training_mirrors_photo_and_mask_together_and_validation_does_not(tmp_path):
    make_pets(tmp_path, draw=solid(lambda x: 1 + x // 16))
    torch.manual_seed(0)
    train, val = (unet.PetDataset(str(tmp_path), part, 32) for part in ("train", "val"))
    seen = set()
    for _ in range(20):
        photo, mask = train[0]
        assert (photo[0, 0, 2] < photo[0, 0, 29]) == (mask[0, 2] < mask[0, 29])
        seen.add(mask[0, 2].item())
        assert val[0][1][0, 2] == 0
    assert seen == {0, 2}


def test_parts_are_disjoint_and_not_cut_by_breed(tmp_path):
    def draw(number):  # photo `number` has the grey level 4 * number, breeds are 0-19 and 20-39
        return Image.new("RGB", (20, 20), (4 * number,) * 3), Image.new("L", (20, 20), 2)
    make_pets(tmp_path, trainval=40, test=20, draw=draw)
    train, val, test = ({round(int(photo[0, 0, 0]) / 4) for photo, _ in unet.PetDataset(str(tmp_path), part, 32)}
                        for part in ("train", "val", "test"))
    assert train | val == set(range(40)) and len(train) == 32 and len(val) == 8
    assert test == set(range(40, 60))
    assert min(val) < 20 <= max(val)


def test_toy_pairs_have_the_format_of_the_dataset():
    photo, trimap = unet.draw_pair(7)
    assert photo.mode == "RGB" and trimap.mode == "L" and photo.size == trimap.size
    assert {label for _, label in trimap.getcolors()} == {1, 2, 3}
    assert unet.draw_pair(7)[0].tobytes() == photo.tobytes() != unet.draw_pair(8)[0].tobytes()


def test_memory_is_four_bytes_a_pixel():
    photo, mask = unet.PetDataset("toy", "test", 128, count=1)[0]
    assert photo.untyped_storage().nbytes() + mask.untyped_storage().nbytes() == 64 * 1024


def damage(pets, kind):
    image, trimap = pets / "images" / "beagle_test3.jpg", pets / "annotations" / "trimaps" / "beagle_test3.png"
    if kind == "truncated photo":
        image.write_bytes(image.read_bytes()[:900])
    elif kind == "text as photo":
        image.write_text("not a photo")
    elif kind == "missing photo":
        image.unlink()
    elif kind == "missing trimap":
        trimap.unlink()
    elif kind == "truncated trimap":
        trimap.write_bytes(trimap.read_bytes()[:90])
    elif kind == "label 0":
        Image.new("L", Image.open(image).size, 0).save(trimap)
    elif kind == "label 200":
        Image.new("L", Image.open(image).size, 200).save(trimap)
    elif kind == "another shape":
        Image.new("L", (7, 9), 2).save(trimap)
    elif kind == "colour trimap":
        Image.new("RGB", Image.open(image).size, (1, 2, 3)).save(trimap)


@pytest.mark.parametrize("kind", ["truncated photo", "text as photo", "missing photo", "missing trimap", "label 0",
                                  "truncated trimap", "label 200", "another shape", "colour trimap"])
def test_bad_files_are_named(pets, trained, capsys, kind):
    damage(pets, kind)
    fails(["test", "--checkpoint", trained], capsys, "beagle_test3")


def test_bad_lists_are_named(pets, trained, capsys):
    for text in ("", "Abyssinian_test0\n"):
        (pets / "annotations" / "test.txt").write_text(text)
        fails(["test", "--checkpoint", trained], capsys, "data", "test")
    (pets / "annotations" / "test.txt").unlink()
    fails(["test", "--checkpoint", trained], capsys, "test.txt", "--data toy")


def test_data_that_is_a_file(tmp_path, trained, capsys):
    (tmp_path / "file").write_text("")
    fails(["test", "--checkpoint", trained, "--data", tmp_path / "file"], capsys, tmp_path / "file")


def test_no_network_names_the_way_out(tmp_path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.chdir(tmp_path)
    fails(["train", *TINY], capsys, "no route to host", "images.tar.gz", "annotations.tar.gz",
          Path("data", "oxford-iiit-pet"), "--data toy")


# ------------------------------------------- model ------------------------------------------------

def test_shape_comments_are_the_real_shapes():
    """Run each commented line of UNet.forward by itself, and compare what it yields with its comment."""
    source = inspect.getsource(unet.UNet.forward)
    lines = re.findall(r"^ *(?:(\w+) =|return) (.+?) +# \(N, +(\d+), +(\d+), +(\d+)\)$", source, re.M)
    assert len(lines) == 18
    values = {"self": unet.UNet().eval(), "x": torch.zeros(2, 3, 128, 128)}
    with torch.no_grad():
        for name, expression, *shape in lines:
            values[name] = eval(expression, values)
            assert values[name].shape == (2, *map(int, shape)), f"{name} = {expression}"


def count(in_channels, classes, base):
    """Weights and biases of the tutorial's network, added up by hand."""
    conv = lambda i, o, k: i * o * k * k + o
    block = lambda i, o: conv(i, o, 3) + conv(o, o, 3)
    c = [base, 2 * base, 4 * base, 8 * base, 16 * base]
    down = block(in_channels, c[0]) + sum(block(i, o) for i, o in zip(c, c[1:]))
    up = sum(conv(i, o, 2) + block(i, o) for o, i in zip(c, c[1:]))
    return down + up + conv(c[0], classes, 1)


@pytest.mark.parametrize("in_channels, classes, base", [(3, 3, 64), (1, 10, 32), (3, 3, 16)])
def test_parameter_count_by_arithmetic(in_channels, classes, base):
    net = unet.UNet(in_channels, classes, base, norm=False)
    assert sum(p.numel() for p in net.parameters()) == count(in_channels, classes, base)
    assert count(3, 3, 64) == 31_031_875


class Tutorial(nn.Module):
    """The network of the tutorials, written from their description alone: two convolutions with ReLU
    a level, 2x2 max pooling, transposed convolutions, concatenation, a 1x1 convolution."""

    def __init__(self, in_channels=3, out_classes=3, base=64):
        super().__init__()
        def block(i, o):
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU())
        widths = [base, base * 2, base * 4, base * 8]
        for level, (i, o) in enumerate(zip([in_channels] + widths, widths), start=1):
            self.add_module(f"enc{level}", block(i, o))
            self.add_module(f"up{level}", nn.ConvTranspose2d(2 * o, o, 2, 2))
            self.add_module(f"dec{level}", block(2 * o, o))
        self.bottleneck = block(base * 8, base * 16)
        self.final = nn.Conv2d(base, out_classes, 1)

    def forward(self, x):
        kept = []
        for level in (1, 2, 3, 4):
            x = self.get_submodule(f"enc{level}")(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for level in (4, 3, 2, 1):
            x = torch.cat([self.get_submodule(f"up{level}")(x), kept.pop()], 1)
            x = self.get_submodule(f"dec{level}")(x)
        return self.final(x)


@pytest.mark.parametrize("in_channels, classes, base, size", [(3, 3, 64, 32), (1, 10, 8, 48), (3, 3, 32, 256)])
def test_without_norm_the_network_is_the_tutorials(in_channels, classes, base, size):
    torch.manual_seed(0)
    reference, net = Tutorial(in_channels, classes, base), unet.UNet(in_channels, classes, base, norm=False)
    net.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(1, in_channels, size, size)
    with torch.no_grad():
        torch.testing.assert_close(net(x), reference(x))


@pytest.mark.parametrize("skip", ["concat", "add", "none"])
def test_each_skip_matters(skip):
    """Cutting the skip of a level changes the output, unless the network has no skips."""
    torch.manual_seed(0)
    net = unet.UNet(base=4, skip=skip).eval()
    x = torch.randn(1, 3, 32, 32)
    join, whole = net.join, net(x)
    assert whole.shape == (1, 3, 32, 32)
    for size in (4, 8, 16, 32):
        net.join = lambda up, skip: join(up, skip * 0 if skip.shape[-1] == size else skip)
        assert torch.equal(net(x), whole) == (skip == "none")


@pytest.mark.parametrize("shape", [(100, 100), (128, 100), (100, 128), (8, 8)])
def test_other_sizes_are_refused_and_named(shape):
    with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]}.*16"):
        unet.UNet(base=2)(torch.zeros(1, 3, *shape))
    assert unet.UNet(base=2).eval()(torch.zeros(1, 3, 16, 48)).shape == (1, 3, 16, 48)


def test_he_initialisation_keeps_the_signal_alive():
    torch.manual_seed(0)
    net = unet.UNet(norm=False)
    weight = net.enc3[2].weight  # 256 -> 256 channels, 3x3: section 3 of the paper asks for sqrt(2 / N)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.02)
    with torch.no_grad():
        assert 0.2 < net(torch.randn(1, 3, 64, 64)).std() < 10  # PyTorch's default gives 0.07


def test_normalisation_and_dropout_are_where_the_page_says():
    kinds = lambda block: [type(layer).__name__ for layer in block]
    assert kinds(unet.conv_block(3, 8))[:3] == ["Conv2d", "BatchNorm2d", "ReLU"]
    net = unet.UNet(base=2, dropout=0.5)
    active = [name for name, layer in net.named_modules() if getattr(layer, "p", 0) > 0]
    assert [name.split(".")[0] for name in active] == ["enc4", "bottleneck"]
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(net(x), net(x)) and torch.equal(net.eval()(x), net(x))


# ------------------------------------------- losses and scores ------------------------------------

def brute_force(true, predicted, classes):
    """IoU and Dice of each class, and the accuracy, pixel by pixel."""
    iou, dice = [], []
    for c in range(classes):
        a = {i for i, value in enumerate(true) if value == c}
        b = {i for i, value in enumerate(predicted) if value == c}
        iou.append(len(a & b) / len(a | b) if a | b else math.nan)
        dice.append(2 * len(a & b) / (len(a) + len(b)) if a | b else math.nan)
    return iou, dice, sum(t == p for t, p in zip(true, predicted)) / len(true)


@pytest.mark.parametrize("present", [3, 2])  # with 2, the third class is absent from truth and prediction
def test_scores_agree_with_brute_force(present):
    rng = random.Random(present)
    true = [rng.randrange(present) for _ in range(500)]
    predicted = [rng.randrange(present) if rng.random() < 0.4 else t for t in true]
    confusion = torch.zeros(3, 3, dtype=torch.long)
    for t, p in zip(true, predicted):
        confusion[t, p] += 1
    iou, dice, accuracy = brute_force(true, predicted, 3)
    mean = lambda values: sum(v for v in values if v == v) / present
    got = unet.scores(confusion)
    assert got["IoU"] == pytest.approx(iou, nan_ok=True) and got["mIoU"] == pytest.approx(mean(iou))
    assert got["Dice"] == pytest.approx(mean(dice)) and got["accuracy"] == pytest.approx(accuracy)


def test_evaluate_scores_the_whole_dataset_at_once_in_eval_mode():
    """One confusion matrix over all photos, and an answer that depends neither on the batches nor on
    the mode in which the network came."""
    torch.manual_seed(0)
    data = unet.PetDataset("toy", "test", 32, count=18)  # full batches of 4 and one of 2
    net = unet.UNet(base=2)
    for _ in range(5):
        net(torch.rand(4, 3, 32, 32))  # gives BatchNorm averages of its own
    before = copy.deepcopy(net.state_dict())
    got = unet.evaluate(net.train(), data, "ce", "fp32")
    photos, masks = stacked(data)
    with torch.no_grad():
        logits = net.eval()(photos / 255)
    iou, dice, accuracy = brute_force(masks.flatten().tolist(), logits.argmax(1).flatten().tolist(), 3)
    assert got["IoU"] == pytest.approx(iou) and got["accuracy"] == pytest.approx(accuracy)
    assert got["val loss"] == pytest.approx(F.cross_entropy(logits, masks.long()).item(), rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def pixels(logits, target):
    """Every pixel as (probabilities by softmax, probabilities by sigmoid, true class)."""
    for z, c in zip(logits.movedim(1, -1).reshape(-1, logits.shape[1]).tolist(), target.flatten().tolist()):
        exp = [math.exp(v) for v in z]
        yield [e / sum(exp) for e in exp], [1 / (1 + math.exp(-v)) for v in z], c


def by_hand(name, logits, target):
    """Each loss from its definition, a pixel at a time."""
    table, classes = list(pixels(logits, target)), range(logits.shape[1])
    if name == "ce":
        return -sum(math.log(soft[c]) for soft, _, c in table) / len(table)
    if name == "weighted-ce":  # every class present has the same say
        of = [[-math.log(soft[c]) for soft, _, c in table if c == k] for k in classes]
        return sum(sum(part) / len(part) for part in of if part) / sum(1 for part in of if part)
    if name == "bce":
        return -sum(math.log(sig[k] if k == c else 1 - sig[k]) for _, sig, c in table for k in classes) / (
            len(table) * len(classes))
    if name == "ce+dice":
        return by_hand("ce", logits, target) + by_hand("dice", logits, target)
    both = [sum(soft[k] for soft, _, c in table if c == k) for k in classes]
    total = [sum(soft[k] + (c == k) for soft, _, c in table) for k in classes]
    ratio = [2 * b / t if name == "dice" else b / (t - b) for b, t in zip(both, total)]
    return 1 - sum(ratio) / len(ratio)


@pytest.mark.parametrize("name", unet.LOSSES)
def test_losses(name):
    torch.manual_seed(0)
    loss = unet.LOSSES[name]
    target = torch.tensor([0.7, 0.25, 0.05]).multinomial(512, replacement=True).view(2, 16, 16)  # one class is rare
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    assert loss(logits, target).item() == pytest.approx(by_hand(name, logits, target), abs=0.005)
    loss(logits, target).backward()
    assert logits.grad.abs().sum() > 0
    perfect, flat = 20 * F.one_hot(target, 3).movedim(-1, 1).float() - 10, torch.zeros(2, 3, 16, 16)
    assert loss(perfect, target) < 0.02 < 0.3 < loss(flat, target)
    absent = torch.randint(0, 2, (2, 16, 16))  # a class without a pixel is no division by zero
    assert math.isfinite(loss(flat, absent)) and loss(20 * F.one_hot(absent, 3).movedim(-1, 1) - 10.0, absent) < 0.01


# ------------------------------------------- training ---------------------------------------------

def optimise(net, x, target, steps, loss="ce", lr=0.01):
    """Plain Adam on one batch; the losses on the way."""
    optimizer, losses = torch.optim.Adam(net.parameters(), lr), []
    for _ in range(steps):
        value = unet.LOSSES[loss](net(x), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def test_overfits_one_batch():
    """The first thing to try with any network: it must be able to learn four photos by heart."""
    torch.manual_seed(0)
    photos, masks = stacked(unet.PetDataset("toy", "test", 64, count=4))
    net, target = unet.UNet(base=8), masks.long()
    optimise(net, photos / 255, target, 80)
    predicted = net(photos / 255).argmax(1)
    confusion = torch.bincount((3 * target + predicted).flatten(), minlength=9).view(3, 3)
    assert unet.scores(confusion)["mIoU"] > 0.95


def test_exercise_gray_photos_and_ten_classes():
    net = unet.UNet(in_channels=1, out_classes=10, base=4)
    x, target = torch.rand(2, 1, 32, 32), torch.randint(0, 10, (2, 32, 32))
    assert net(x).shape == (2, 10, 32, 32)
    losses = optimise(net, x, target, 20)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss", ["bce", "dice"])
def test_exercise_one_class_out(loss):
    """Cells or no cells: one channel in, one out, a logit above 0 means yes."""
    torch.manual_seed(0)
    target = (torch.rand(2, 1, 4, 4) > 0.5).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    net = unet.UNet(in_channels=1, out_classes=1, base=4)
    x = target + 0.1 * torch.randn_like(target)
    optimise(net, x, target[:, 0].long(), 40, loss)
    assert ((net(x) > 0) == (target > 0.5)).float().mean() > 0.95


def test_exercise_three_levels():
    """The smaller network of one tutorial, from the same conv_block: three poolings, 64 to 512 channels."""
    class ThreeLevels(nn.Module):
        def __init__(self, base=64):
            super().__init__()
            c = [base, 2 * base, 4 * base, 8 * base]
            self.enc = nn.ModuleList(unet.conv_block(i, o) for i, o in zip([3] + c, c))
            self.up = nn.ModuleList(nn.ConvTranspose2d(2 * o, o, 2, 2) for o in c[2::-1])
            self.dec = nn.ModuleList(unet.conv_block(2 * o, o) for o in c[2::-1])
            self.out = nn.Conv2d(base, 3, 1)

        def forward(self, x):
            x1 = self.enc[0](x)
            x2 = self.enc[1](F.max_pool2d(x1, 2))
            x3 = self.enc[2](F.max_pool2d(x2, 2))
            x = self.enc[3](F.max_pool2d(x3, 2))
            for up, dec, kept in zip(self.up, self.dec, (x3, x2, x1)):
                x = dec(torch.cat((up(x), kept), dim=1))
            return self.out(x)

    torch.manual_seed(0)
    photos, masks = stacked(unet.PetDataset("toy", "test", 32, count=4))
    losses = optimise(ThreeLevels(8), photos / 255, masks.long(), 30)
    assert losses[-1] < 0.5 * losses[0]


def test_exercise_a_longer_run_lowers_the_loss(pets, capsys):
    unet.main(["train", "--epochs", "1", "--checkpoint", "short.pt", *TINY])
    unet.main(["train", "--epochs", "8", "--checkpoint", "long.pt", *TINY])
    short, long = (torch.load(name)["history"] for name in ("short.pt", "long.pt"))
    assert len(long) == 8 and long[-1]["train loss"] < short[-1]["train loss"]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoint_is_plain_and_complete(trained):
    state = torch.load(trained, weights_only=True)
    assert {"model", "config", "size", "optimizer", "schedule", "history"} <= state.keys()
    assert state["size"] == 32 and len(state["history"]) == 2
    assert state["config"] == {"in_channels": 3, "out_classes": 3, "base": 2, "skip": "concat", "norm": True, "dropout": 0}
    # 8 training photos in batches of 4, two epochs: the schedule has taken all of its four steps.
    assert state["schedule"]["last_epoch"] == state["schedule"]["total_steps"] == 4


def test_checkpoint_round_trip_gives_equal_logits(tmp_path):
    torch.manual_seed(0)
    net, x = unet.UNet(base=2, skip="add", norm=False).eval(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    config = {"in_channels": 3, "out_classes": 3, "base": 2, "skip": "add", "norm": False, "dropout": 0.0}
    rest = {"size": 32, "options": {}, "history": [], "optimizer": {}, "schedule": {}, "scaler": {}}
    torch.save({"model": net.state_dict(), "config": config, **rest}, tmp_path / "net.pt")
    _, loaded = unet.load_checkpoint(tmp_path / "net.pt", torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(unet.segment(loaded, x, "fp32"), net(x / 255))


def test_same_seed_same_weights(pets):
    for name, seed in (("a.pt", "0"), ("b.pt", "0"), ("c.pt", "1")):
        unet.main(["train", "--epochs", "1", "--seed", seed, "--checkpoint", name, *TINY])
    assert same(weights("a.pt"), weights("b.pt")) and not same(weights("a.pt"), weights("c.pt"))


@pytest.mark.parametrize("after", [1, 2])
def test_interrupted_and_resumed_is_bit_for_bit_the_same(pets, monkeypatch, after):
    argv = ["train", "--epochs", "3", "--dropout", "0.5", *TINY]
    unet.main([*argv, "--checkpoint", "whole.pt"])
    with monkeypatch.context() as patch:
        epochs = itertools.count()
        def interrupt(*args, real=unet.train_epoch):  # Ctrl-C at the end of epoch `after` + 1
            result = real(*args)
            if next(epochs) == after:
                raise KeyboardInterrupt
            return result
        patch.setattr(unet, "train_epoch", interrupt)
        with pytest.raises(SystemExit, match="--resume"):
            unet.main(argv)
    assert len(torch.load("unet.pt")["history"]) == after
    unet.main([*argv, "--resume"])
    assert same(weights("whole.pt"), weights("unet.pt"))
    assert [row["mIoU"] for row in torch.load("whole.pt")["history"]] == [row["mIoU"] for row in torch.load("unet.pt")["history"]]


def test_killed_and_resumed_is_bit_for_bit_the_same(pets):
    argv = ["train", "--epochs", "8", *TINY]
    unet.main([*argv, "--checkpoint", "whole.pt"])
    process = subprocess.Popen([sys.executable, HERE / "unet.py", *argv], stdout=subprocess.PIPE, text=True)
    while "epoch  2/8" not in process.stdout.readline():
        pass
    process.kill()
    process.wait()
    if len(torch.load("unet.pt")["history"]) < 8:  # unless this machine slept through six epochs
        unet.main([*argv, "--resume"])
    assert same(weights("whole.pt"), weights("unet.pt"))


def test_a_crash_while_saving_leaves_the_old_checkpoint(pets, monkeypatch):
    argv = ["train", "--epochs", "2", *TINY]
    saves = itertools.count()
    def crash(state, path, real=torch.save):
        if next(saves) == 1:
            Path(path).write_bytes(b"half a fi")
            raise KeyboardInterrupt
        real(state, path)
    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(SystemExit):
        unet.main(argv)
    assert len(torch.load("unet.pt")["history"]) == 1


def test_a_full_disk_is_reported_and_leaves_the_old_checkpoint(pets, monkeypatch, capsys):
    Path("unet.pt").write_text("precious")
    def full(state, path):  # what PyTorch raises when the disk is full
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")
    monkeypatch.setattr(torch, "save", full)
    fails(["train", "--epochs", "1", *TINY], capsys, "unet.pt.tmp", "disk")
    assert Path("unet.pt").read_text() == "precious"


def test_resume_after_the_last_epoch_and_with_other_options(pets, capsys):
    argv = ["train", "--epochs", "1", *TINY]
    unet.main(argv)
    before = Path("unet.pt").read_bytes()
    fails([*argv, "--resume"], capsys, "nothing is left")
    make_pets(Path("elsewhere"))
    for option, value in (("--epochs", 2), ("--base", 3), ("--skip", "add"), ("--norm", "none"), ("--size", 48),
                          ("--data", "elsewhere"), ("--lr", 0.1), ("--loss", "dice"), ("--seed", 5), ("--batch-size", 2)):
        fails([*argv, "--resume", option, value], capsys, "unet.pt", option.strip("-").replace("-", "_"))
    assert Path("unet.pt").read_bytes() == before


def test_training_anew_keeps_the_old_checkpoint(pets, capsys):
    Path("unet.pt").write_text("precious")
    unet.main(["train", "--epochs", "1", *TINY])
    assert Path("unet.pt.bak").read_text() == "precious" and "unet.pt.bak" in capsys.readouterr().out
    assert torch.load("unet.pt")["history"]


def test_a_loss_that_is_not_finite_stops_the_run(pets, monkeypatch, capsys):
    argv = ["train", "--epochs", "1", *TINY]
    unet.main(argv)
    before = Path("unet.pt").read_bytes()
    monkeypatch.setitem(unet.LOSSES, "ce", lambda logits, target: F.cross_entropy(logits, target) * math.nan)
    fails(argv, capsys, "not finite", "--lr")
    assert Path("unet.pt").read_bytes() == before


def test_every_step_starts_from_zero_gradients():
    """At learning rate 0 the second step on the same batch must find the gradients of the first."""
    torch.manual_seed(0)
    net, args = unet.UNet(base=2), type("Args", (), {"loss": "ce", "precision": "fp32"})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)
    gradients = []
    for batches in ([batch], [batch, batch]):
        unet.train_epoch(net, batches, args, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), "")
        gradients.append(net.final.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_every_epoch_sees_each_photo_once_in_a_new_order(pets, monkeypatch):
    seen = []
    class Spy(unet.PetDataset):
        def __getitem__(self, i):
            seen.append((self.mirror, i))
            return super().__getitem__(i)
    monkeypatch.setattr(unet, "PetDataset", Spy)
    unet.main(["train", "--epochs", "3", *TINY])
    order = [i for training, i in seen if training]
    epochs = order[:8], order[8:16], order[16:]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_of_the_convolutions(name, dtype):
    net, seen = unet.UNet(base=2), []
    net.enc2.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logits = unet.segment(net, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), name)
    assert seen == [dtype] and logits.dtype == torch.float32


def test_automatic_device_is_the_accelerator_if_one_works(monkeypatch):
    assert unet.find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert unet.find_device("auto") == torch.device("cuda")


def test_automatic_precision_follows_the_hardware(monkeypatch):
    for features, expected in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
                               ({"avx512_bf16": False}, "fp32"), ({}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
        assert unet.pick_precision(torch.device("cpu")) == expected
    for card, expected in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")):  # H100, A100, T4
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
        assert unet.pick_precision(torch.device("cuda")) == expected
    assert unet.pick_precision(torch.device("mps")) == "fp32"


def test_automatic_precision_is_what_segment_and_train_take(pets, monkeypatch):
    monkeypatch.setattr(unet, "pick_precision", lambda device: "bf16")
    net, seen = unet.UNet(base=2), []
    net.enc2.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    unet.segment(net, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert seen == [torch.bfloat16]
    unet.main(["train", "--epochs", "1", *TINY, "--precision", "auto"])
    assert torch.load("unet.pt")["options"]["precision"] == "bf16"


# ------------------------------------------- using it ---------------------------------------------

def run(*argv, cwd, **environment):
    return subprocess.run([sys.executable, HERE / "unet.py", *map(str, argv)], cwd=cwd, capture_output=True,
                          text=True, timeout=170, env={**os.environ, **environment})


def test_every_command_on_toy_data(tmp_path):
    """What a stranger would try first, each in a process of its own, without a display."""
    tiny = "--data toy --base 4 --size 32 --epochs 2 --device cpu".split()
    done = run("train", *tiny, cwd=tmp_path, DISPLAY="")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2, done
    assert all(re.search(r"loss \d\.\d+  val loss \d\.\d+  mIoU 0\.\d{3} .* images/s$", line) for line in lines)
    assert "\r" not in done.stdout and "\x1b" not in done.stdout and not done.stderr
    done = run("test", "--data", "toy", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0 and re.search(r"mIoU 0\.\d{3}", done.stdout) and "border" in done.stdout
    done = run("show", "--data", "toy", "--device", "cpu", cwd=tmp_path, DISPLAY="")
    assert done.returncode == 0 and len(Image.open(tmp_path / "unet.png").convert("RGB").getcolors(10**6)) > 1000
    Image.new("RGB", (75, 50), "red").save(tmp_path / "a photo \u00e9.png")
    done = run("predict", "a photo \u00e9.png", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0 and Image.open(tmp_path / "prediction.png").size == (75, 50)
    done = run("shapes", "--base", 32, "--size", 256, cwd=tmp_path)
    for shape in ("(1, 3, 256, 256)", "(1, 32, 256, 256)", "(1, 512, 16, 16)", "(1, 512, 32, 32)"):
        assert shape in done.stdout  # rows of the shape table of the tutorial
    assert run(cwd=tmp_path).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="PyTorch for Windows comes without torchrun's libuv")
def test_two_workers_share_each_epoch(tmp_path):
    """torchrun over gloo: one worker prints and saves, the score is that of one worker."""
    argv = "train --data toy --base 4 --size 32 --epochs 2 --device cpu --precision fp32".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = subprocess.run([*command, HERE / "unet.py", *argv, "--checkpoint", "two.pt"], cwd=tmp_path,
                         capture_output=True, text=True, timeout=170)
    assert two.returncode == 0 and two.stdout.count("mIoU") == 2, two
    unet.main([*argv, "--checkpoint", str(tmp_path / "one.pt")])
    one, two = (torch.load(tmp_path / name)["history"][-1]["mIoU"] for name in ("one.pt", "two.pt"))
    assert abs(one - two) < 0.15
    broken = subprocess.run([*command, HERE / "unet.py", *argv, "--data", "nowhere/at/all"], cwd=tmp_path,
                            capture_output=True, text=True, timeout=170)
    assert broken.returncode != 0


def test_progress_is_for_terminals_only(pets, monkeypatch, capsys):
    clock = itertools.count(step=1.0)
    monkeypatch.setattr(unet.time, "perf_counter", lambda: next(clock))
    unet.main(["train", "--epochs", "1", *TINY])
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    unet.main(["train", "--epochs", "1", *TINY])
    updating = capsys.readouterr().out
    assert "\r" not in plain and "step" not in plain
    *steps, last, kept, end = re.split(r"[\r\n]", updating)  # steps return to the start of their line
    assert len(steps) == 2 and last.startswith("epoch  1/1  loss") and kept.endswith(".bak")
    assert re.search(r"^epoch  1/1  step 1/2  loss \d\.\d+  [\d.]+ images/s  \d+ s left", steps[0])
    assert max(map(len, steps)) <= len(last) <= 80  # so that the last covers them


BAD_OPTIONS = [
    ("--epochs", "0", "1"), ("--epochs", "-1", "1"), ("--epochs", "1.5", "int"), ("--epochs", "many", "9999"),
    ("--batch-size", "0", "1024"), ("--batch-size", "100000", "1024"), ("--size", "100", "16"), ("--size", "0", "32"),
    ("--base", "0", "256"), ("--lr", "nan", "0"), ("--lr", "0", "0"), ("--lr", "-1", "0"), ("--lr", "inf", "1"),
    ("--dropout", "2", "0.9"), ("--dropout", "nan", "0"), ("--seed", "-1", "0"), ("--device", "tpu9", "device"),
    ("--device", "meta", "device"), ("--loss", "mse", "ce+dice"), ("--skip", "all", "concat"), ("--norm", "x", "batch"),
    ("--precision", "fp8", "bf16"), ("--checkpoint", "no/such/folder/unet.pt", "folder"), ("--checkpoint", ".", "file"),
]


@pytest.mark.parametrize("option, value, rule", BAD_OPTIONS)
def test_bad_options_are_refused_with_their_range(option, value, rule, capsys):
    line = fails(["train", "--data", "toy", option, value], capsys, option, rule)
    assert len(line) < 200


def test_unknown_commands_and_pictures_are_refused(tmp_path, trained, capsys):
    fails(["fly"], capsys, "fly", "train")
    for out in ("a.xyz", "a", "no/such/folder/a.png"):
        fails(["show", "--checkpoint", trained, "--out", out], capsys, "--out", ".png")
        fails(["predict", "x.jpg", "--checkpoint", trained, "--out", out], capsys, "--out", ".png")


@pytest.mark.parametrize("command", ["train", "test", "show", "predict", "shapes"])
def test_help_lists_the_commands_own_options_with_their_defaults(command, capsys):
    with pytest.raises(SystemExit):
        unet.main([command, "--help"])
    text = capsys.readouterr().out
    assert ("--epochs" in text) == (command == "train") and ("--out" in text) == (command in ("show", "predict"))
    assert "(default: " in text


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "truncated", "text", "keys", "other", "classes", "trap"])
def test_bad_checkpoints_are_named_by_every_command(pets, trained, capsys, kind):
    path, good = Path("bad.pt"), torch.load(trained)
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        path.write_bytes(trained.read_bytes()[:-2000])
    elif kind == "text":
        path.write_text("no checkpoint")
    elif kind == "keys":
        torch.save({key: value for key, value in good.items() if key != "size"}, path)
    elif kind == "other":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    elif kind == "classes":
        net = unet.UNet(out_classes=5, base=2)
        torch.save({**good, "config": {**good["config"], "out_classes": 5}, "model": net.state_dict()}, path)
    elif kind == "trap":
        path.write_bytes(pickle.dumps(Trap(), protocol=2))
    photo = next((pets / "images").iterdir())
    for argv in (["test"], ["show"], ["predict", photo], ["train", *TINY, "--resume"]):
        fails([*argv, "--checkpoint", path], capsys, "bad.pt")
    assert not Path("sprung").exists()


def gradient(mode, size=(64, 48)):
    image = Image.linear_gradient("L").resize(size)
    if mode.startswith("I;16"):  # the same picture with 16 bits: each value times 257
        order = "big" if mode.endswith("B") else "little"
        return Image.frombytes(mode, size, b"".join((257 * v).to_bytes(2, order) for v in image.tobytes()))
    return image.convert("RGB").convert(mode)


@pytest.mark.parametrize("mode, suffix", [("RGB", ".png"), ("L", ".png"), ("1", ".png"), ("P", ".png"), ("RGBA", ".png"),
                                          ("LA", ".png"), ("CMYK", ".jpg"), ("I;16", ".png"), ("I;16", ".tif"), ("I;16B", ".tif"),
                                          ("RGB", ".webp"), ("RGB", ".bmp"), ("P", ".gif"), ("RGB", ".tif")])
def test_predict_reads_every_kind_of_photo(tmp_path, trained, mode, suffix):
    photo, out = tmp_path / f"photo{suffix}", tmp_path / "out.png"
    gradient(mode).save(photo)
    unet.main(["predict", str(photo), "--checkpoint", str(trained), "--out", str(out)])
    result = Image.open(out)
    assert result.size == (64, 48) and result.mode == "RGB"
    if mode.startswith("I;16"):  # as its 8-bit twin, and not clipped to white
        gradient("L").save(tmp_path / "twin.png")
        unet.main(["predict", str(tmp_path / "twin.png"), "--checkpoint", str(trained), "--out", str(tmp_path / "twin_out.png")])
        assert result.tobytes() == Image.open(tmp_path / "twin_out.png").tobytes()


@pytest.mark.parametrize("size", [(1, 1), (640, 3), (3000, 2000)])
def test_predict_keeps_the_size_of_the_photo(tmp_path, trained, size):
    Image.new("RGB", size, "orange").save(tmp_path / "photo.png")
    unet.main(["predict", str(tmp_path / "photo.png"), "--checkpoint", str(trained), "--out", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == size


def test_predict_turns_phone_photos_upright(tmp_path, trained):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held at a right angle
    gradient("RGB").save(tmp_path / "photo.jpg", exif=exif)
    unet.main(["predict", str(tmp_path / "photo.jpg"), "--checkpoint", str(trained), "--out", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == (48, 64)


def test_predict_never_overwrites_the_photo(tmp_path, trained, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gradient("RGB").save("photo.png")
    before = Path("photo.png").read_bytes()
    for out in ("photo.png", "./photo.png", tmp_path / "photo.png"):
        fails(["predict", "photo.png", "--checkpoint", trained, "--out", out], capsys, "photo.png")
    Path("broken.png").write_bytes(before[:100])
    fails(["predict", "broken.png", "--checkpoint", trained], capsys, "broken.png")
    fails(["predict", "missing.png", "--checkpoint", trained], capsys, "missing.png")
    assert Path("photo.png").read_bytes() == before


def test_predict_resizes_logits_and_not_labels(tmp_path, trained, monkeypatch):
    """Two logits, 3 (pet) and -1 against 0 (background), on 80 pixels: their centres are at 20 and 60,
    the blend is 0 three quarters of the way, at 50. Resized labels would change in the middle, at 40."""
    logits = torch.tensor([[[[3.0, -1.0]], [[0.0, 0.0]], [[-9.0, -9.0]]]])
    monkeypatch.setattr(unet, "segment", lambda net, photos: logits)
    Image.new("RGB", (80, 20)).save(tmp_path / "photo.png")
    unet.main(["predict", str(tmp_path / "photo.png"), "--checkpoint", str(trained), "--out", str(tmp_path / "out.png")])
    row = [Image.open(tmp_path / "out.png").getpixel((x, 10)) for x in range(80)]
    assert len(set(row)) == 2 and row.index(row[-1]) == 50
    assert row[0][0] > row[0][2] and row[-1][0] < row[-1][2]  # pet is orange, background blue


# ------------------------------------------- the page ---------------------------------------------

def test_the_page_keeps_its_form():
    lines = (HERE / "unet.py").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_readme_points_at_the_right_lines():
    """Each row `idea | unet.py:120 | code` of the README's map must name the line that holds that code."""
    lines = (HERE / "unet.py").read_text(encoding="utf-8").splitlines()
    rows = re.findall(r"\| `unet\.py:(\d+)` \| `(.+?)` \|", (HERE / "README.md").read_text(encoding="utf-8"))
    assert len(rows) >= 10
    for number, code in rows:
        assert code in lines[int(number) - 1], f"unet.py:{number} is {lines[int(number) - 1]!r}, not {code!r}"
