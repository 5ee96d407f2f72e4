"""Tests of unet.py, and a second explanation of it. Five to read first: test_the_network_is_the_tutorials,
test_every_shape_on_the_page_is_the_real_one, test_each_skip_matters, test_dice_loss_by_hand, and
test_overfits_one_batch. The tutorials end with exercises: test_exercise_... are the answers."""
import functools, inspect, itertools, math, os, re, runpy, subprocess, sys, traceback, types
from pathlib import Path
from unittest.mock import MagicMock, Mock, patch
import pytest, torch, unet
import torch.nn as nn, torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, random_split

HERE = Path(__file__).parent
PAGE, README = ((HERE / name).read_text(encoding="utf-8") for name in ("unet.py", "README.md"))
SEED = 0  # any other does as well
DRAWINGS = [unet.draw_pair(k) for k in range(10)]
CPU = {"DEVICE": torch.device("cpu"), "LAYOUT": torch.channels_last, "BF16": False}
torch.set_num_threads(1)  # networks this small only wait for a second thread

@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """Every test works on the CPU, in float32, in an empty folder of its own."""
    vars(unet).update(CPU)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(SEED)

@pytest.fixture
def trained(made=[]):
    """toy.pt, the checkpoint of a small network that has learned the toy drawings (once)."""
    if not made:
        unet.train(data="toy", epochs=3, size=32, base=8, seed=SEED, checkpoint="toy.pt")
        made.append(Path("toy.pt").read_bytes())
    Path("toy.pt").write_bytes(made[0])

def shell(words, page=unet):
    with patch.object(sys, "argv", ["unet.py", *words.split()]):
        page.main()

def fails(words, *parts):
    """The command must end with one line that has these parts, in this order."""
    pytest.raises(SystemExit, shell, words).match(r"\A\s*.*" + ".*".join(parts) + r".*\s*\Z")

def python(*words):
    """A fresh process, on the CPU in float32 and with one thread, as the tests are."""
    Path("sitecustomize.py").write_text("import torch\ntorch.cpu.get_capabilities = dict\n"
                                        "torch.accelerator.current_accelerator = lambda **_: None\n")
    plain = {"PYTHONPATH": f".{os.pathsep}{HERE}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=os.environ | plain, capture_output=True, text=True)
    assert done.returncode == 0, done
    return done

def edited(*edits):
    """The page with some of its code, (old, new), written otherwise."""
    page = types.ModuleType("page")
    exec(functools.reduce(lambda text, edit: text.replace(*edit), edits, PAGE), vars(page))
    vars(page).update(CPU)
    return page

def write_pets(trainval=10, test=4, draw=unet.draw_pair):
    """A dataset in the official layout: draw(k) gives photo and trimap k, those of trainval first."""
    folder, lines = Path("data/oxford-iiit-pet"), [f"pet_{k} 1 1 1\n" for k in range(trainval + test)]
    (folder / "images").mkdir(parents=True)
    (folder / "annotations/trimaps").mkdir(parents=True)
    (folder / "annotations/trainval.txt").write_text("".join(lines[:trainval]))
    (folder / "annotations/test.txt").write_text("".join(lines[trainval:]))
    for k in range(trainval + test):
        photo, trimap = draw(k)
        photo.save(folder / f"images/pet_{k}.jpg", quality=95)
        trimap.save(folder / f"annotations/trimaps/pet_{k}.png")
    return folder

def batch(pairs, size):
    """Photos (N, 3, size, size) and masks (N, size, size), as network and losses take them."""
    photos, masks = next(iter(DataLoader(unet.PetDataset(pairs, size), len(pairs))))
    return photos / 255, masks

def learn(net, x, target, loss_fn, steps):
    """Adam on one batch, always at the same rate; how much of the loss is left."""
    optimizer, photos = torch.optim.Adam(net.parameters(), lr=0.01), 255 * x
    losses = [unet.train_epoch(net, [(photos, target)], loss_fn, optimizer, Mock()) for _ in range(steps)]
    return losses[-1] / losses[0]

@pytest.mark.parametrize("in_channels, classes, base, size", [(3, 3, 64, 16), (1, 10, 8, 48)])
def test_the_network_is_the_tutorials(in_channels, classes, base, size):
    """From their words, with the page's weights and, for the bias of a convolution, that of BatchNorm."""
    net, x = unet.UNet(in_channels, classes, base).eval(), torch.randn(2, in_channels, size, size + 16)
    def block(name, x):
        conv1, norm1, _, conv2, norm2, _ = net.get_submodule(name)
        assert str(norm1) == str(norm2) == str(nn.BatchNorm2d(conv1.out_channels))  # eps, momentum: PyTorch's
        x = norm1(F.conv2d(x, conv1.weight, padding=1)).relu()
        return norm2(F.conv2d(x, conv2.weight, padding=1)).relu()
    def level(k, x):  # with all that is below it
        skip, up = block(f"enc{k}", x), net.get_submodule(f"up{k}")
        below = level(k + 1, F.max_pool2d(skip, 2)) if k < 4 else block("bottleneck", F.max_pool2d(skip, 2))
        return block(f"dec{k}", torch.cat((F.conv_transpose2d(below, up.weight, up.bias, stride=2), skip), 1))
    torch.testing.assert_close(net(x), F.conv2d(level(1, x), net.final.weight, net.final.bias))
    assert base != 64 or sum(p.numel() for p in net.parameters()) == 31_031_875 + 5_888  # BatchNorm's scales
    for layer, variance in ((net.enc2[0], 2 / (9 * base)), (net.final, 2 / base), (net.up4, 1 / (16 * base))):
        noise = math.sqrt(2 / layer.weight.numel())
        assert layer.weight.var().item() == pytest.approx(variance, rel=5 * noise)  # He initialisation

def test_every_shape_on_the_page_is_the_real_one():
    """Run each line of UNet.forward by itself: do its comment and the drawing tell its shape?"""
    source = inspect.getsource(unet.UNet.forward).replace("def forward(self, x):", "x = x")
    lines = re.findall(r"(\w+)(?: =)? (.+?) +# \(N, +(\d+), +(\d+), +(\d+)\)", source)
    drawn = re.findall(r"(\w+) +\((\d+), (\d+), (\d+)\)", unet.__doc__)
    assert len(lines) == 19 and len(drawn) == 11
    values = {"self": unet.UNet().eval(), "torch": torch, "x": torch.zeros(2, 3, 128, 128)}
    for name, expression, *shape in lines:
        values[name] = eval(expression, values)
        assert values[name].shape == (2, *map(int, shape)), expression
    short = {"photo": "x", "logits": "return", "bottleneck": "b"}  # enc1 is e1, dec1 is d1
    for name, *shape in drawn:
        assert values[short.get(name, name[0] + name[-1])].shape == (2, *map(int, shape)), name

def test_each_skip_matters(monkeypatch):
    """Zeros for the encoder's features of any one level change the output."""
    net, x, cat = unet.UNet(base=4).eval(), torch.randn(1, 3, 32, 32), torch.cat
    whole = net(x)
    for size in (4, 8, 16, 32):
        monkeypatch.setattr(torch, "cat", lambda p, dim: cat((p[0], p[1] * (p[1].shape[-1] != size)), dim))
        assert not torch.equal(net(x), whole)

def test_exercise_what_are_skips_for(monkeypatch):
    """To cut them all, 0 * e4 ... 0 * e1, is to give the decoder zeros for the encoder's features."""
    page = edited(*[(f"(d{k}, e{k})", f"(d{k}, 0 * e{k})") for k in "1234"])
    net, cut, x, cat = unet.UNet(base=4), page.UNet(base=4), torch.randn(1, 3, 32, 32), torch.cat
    cut.load_state_dict(net.state_dict())
    output = cut(x)
    monkeypatch.setattr(torch, "cat", lambda p, dim: cat((p[0], 0 * p[1]), dim))
    assert torch.equal(net(x), output)

def test_compute_logits_uses_the_fast_kernels(monkeypatch):
    monkeypatch.setattr(unet, "BF16", True)
    net, seen = unet.UNet(base=2), []
    net.enc2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert unet.compute_logits(net, torch.zeros(2, 3, 32, 32).byte()).dtype == torch.float32
    assert seen[0].dtype == torch.bfloat16 and seen[0].is_contiguous(memory_format=torch.channels_last)

def test_exercise_a_transposed_convolution_is_a_convolution_over_inserted_zeros():
    up, x, spread = unet.UNet(base=2).up1, torch.randn(1, 4, 5, 7), torch.zeros(1, 4, 10, 14)
    spread[:, :, ::2, ::2] = x
    kernel = up.weight.transpose(0, 1).flip(2, 3)  # (out, in, 2, 2), turned by half a turn
    torch.testing.assert_close(up(x), F.conv2d(F.pad(spread, (1, 0, 1, 0)), kernel, up.bias))

def test_exercise_three_levels():
    """Strike out levels 3 and 4, and join what is left. Two poolings leave 9 of 36 pixels."""
    gone = re.findall(r".*self\.(?:enc|up|dec)[34].*\n|.*\(\(d[34].*\n", PAGE)
    joined = ("conv_block(c4, c5)", "conv_block(c2, c3)"), ("pool(e4)", "pool(e2)"), ("up2(d3)", "up2(b)")
    net = edited(*[(line, "") for line in gone], *joined).UNet(base=8)
    assert len(gone) == 14 and learn(net, *batch(DRAWINGS[:4], 36), unet.LOSSES["ce"], 30) < 0.5

@pytest.mark.parametrize("cut, first, last", [
    ("nothing", 162, 349), ("up4(b)", 194, 317), ("up3(d4)", 226, 285), ("up2(d3)", 244, 269)])
def test_exercise_how_far_a_pixel_sees(cut, first, last):
    """Pixel 256 sees 188, from 162 to 349, if nothing can cancel. By hand, with two levels: dec1 sees 254 to
    258, below these are 127 to 129; dec2 and enc2 see 123 to 133, above 246 to 267; enc1 sees 244 to 269."""
    page = edited(("nn.MaxPool2d", "nn.AvgPool2d"), (cut, cut.replace("(", "(0 * ")))
    net, x = page.UNet(base=1).double().eval(), torch.ones(1, 3, 512, 512).double().requires_grad_()
    net.load_state_dict({name: value.abs() for name, value in net.state_dict().items()})
    net(x)[0, 0, 256, 256].backward()
    pixels = x.grad[0, 0].any(dim=0).nonzero()
    assert (pixels.min().item(), pixels.max().item()) == (first, last)

def test_dice_loss_by_hand(monkeypatch):
    """And cross-entropy. Two photos of two pixels, counted together: a has 1.5 of them, and truly 2."""
    monkeypatch.setattr(unet, "CLASSES", "abcd")
    photos = [[[.6, .2, .1, .1], [.3, .5, .1, .1]]], [[[.4, .1, .4, .1], [.2, .1, .6, .1]]]
    logits = torch.tensor(photos).log().movedim(-1, 1) + torch.randn(2, 1, 1, 2)  # softmax undoes the sum
    target = torch.tensor([[[0, 1]], [[0, 2]]])
    dice = 3 / (1.5 + 2 + 1), (2 * .5 + 1) / (.9 + 1 + 1), (2 * .6 + 1) / (1.2 + 1 + 1), 1 / (.4 + 1)
    assert unet.LOSSES["dice"](logits, target).item() == pytest.approx(1 - sum(dice) / 4, abs=1e-6)
    assert unet.LOSSES["ce"](logits, target).item() == pytest.approx(-math.log(.6**2 * .5 * .4) / 4, abs=1e-6)

@pytest.mark.parametrize("truth, prediction, by_hand", [("012", "012", [0, 1, 1, 1, 1, 1]),
    ("001", "011", [1 / 3, .5, 2 / 3, .5, .5, math.nan]), ("011", "002", [2 / 3, 1 / 6, 2 / 9, .5, 0, 0]),
    ("002", "011", [2 / 3, 1 / 6, 2 / 9, .5, 0, 0]),
    ("0000000001", "0000001110", [.4, .3, 3 / 8, .6, 0, math.nan])])
def test_evaluate_counts_every_pixel_once_in_eval_mode(truth, prediction, by_hand):
    """Photos of one pixel, their own logits. A class that is nowhere (nan) is in no mean."""
    pixel = 255 * torch.eye(3, dtype=torch.uint8).view(3, 3, 1, 1)
    dataset = [(pixel[int(p)], torch.tensor([[int(t)]])) for t, p in zip(truth, prediction)]
    wrong = lambda x, target: not torch.is_grad_enabled() and (1 - x.gather(1, target[:, None])).mean()
    scores = unet.evaluate(nn.Dropout(0.9), dataset, wrong)  # in training, it would drop most logits
    wanted = dict(zip(["unseen loss", "mIoU", "Dice", "pet", "background", "border"], by_hand))
    assert scores == pytest.approx(wanted, nan_ok=True) and list(scores) == list(wanted)
    assert unet.count_pixels(pixel.long(), pixel.long()).dtype == torch.int64

def test_exercise_ce_plus_dice():
    """The sum of both losses, a function, goes wherever either goes, and falls."""
    both = lambda logits, target: sum(loss_fn(logits, target) for loss_fn in unet.LOSSES.values())
    assert learn(unet.UNet(base=8), *batch(DRAWINGS[:4], 32), both, 40) < 0.5

def test_exercise_class_weights():
    """A weight of 1 / (its pixels) for each class gives all classes the same say, however small they are."""
    logits, target = torch.randn(2, 3, 8, 8), torch.tensor([8.0, 1, 1]).multinomial(128, True).view(2, 8, 8)
    weighted = nn.CrossEntropyLoss(weight=1 / target.flatten().bincount(minlength=3))(logits, target)
    pixels = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(weighted, sum(pixels[target == c].mean() for c in range(3)) / 3)

def test_exercise_one_class_out():
    """Cell or no cell: one channel in, one out; a logit above 0, a probability above 1/2, means yes."""
    target = (torch.rand(2, 1, 4, 4) > 0.5).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    net = unet.UNet(in_channels=1, out_classes=1, base=4)
    learn(net, target + 0.1 * torch.randn_like(target), target, F.binary_cross_entropy_with_logits, 60)
    assert ((net(target) > 0) == (target > 0.5)).float().mean() > 0.95

def test_exercise_soft_iou():
    """Intersection over union as a loss, of probabilities. On certain answers it is the IoU of the scores."""
    def iou_loss(logits, target):
        shared, total = unet.count_pixels(logits.softmax(dim=1), unet.one_hot(target))
        return 1 - (shared / (total - shared)).mean()
    true, predicted = torch.tensor([[[[0, 1, 1]]], [[[0, 0, 2]]]])  # their IoU: 1/2, 0 and 0
    assert iou_loss(60.0 * unet.one_hot(predicted), true).item() == pytest.approx(1 - 1 / 6, abs=1e-5)
    assert learn(unet.UNet(base=8), *batch(DRAWINGS[:4], 32), iou_loss, 40) < 0.7

def test_overfits_one_batch():
    """The first thing to try with any network: it must be able to learn four photos by heart."""
    net, (x, target) = unet.UNet(base=8), batch(DRAWINGS[:4], 32)
    learn(net, x, target, unet.LOSSES["ce"], 150)
    shared, total = unet.count_pixels(unet.one_hot(net(x).argmax(dim=1)), unet.one_hot(target))
    assert (shared / (total - shared)).mean() > 0.95  # the mIoU

def test_exercise_a_longer_run_lowers_the_loss(trained):
    first, _, last = torch.load("toy.pt")["history"]
    assert last["train loss"] < 0.5 * first["train loss"] and last["unseen loss"] < first["unseen loss"]
    assert last["mIoU"] > 0.55  # all background has 0.27

@pytest.mark.parametrize("mode", ["L", "I;16", "I"])
def test_a_sample_is_a_square_of_bytes_and_mirroring_turns_half_of_them(mode):
    """Black beside white gives grey. Pet (1) beside border (3): a mean of them would be background (2)."""
    Image.frombytes("L", (192, 64), b"\1\3\3" * 2048 + b"\2" * 6144).convert(mode).save("trimap.tif")
    pairs = [(Image.frombytes("L", (192, 64), b"\0\377\377" * 4096).convert("RGB"), Image.open("trimap.tif"))]
    dataset, mirrored = unet.PetDataset(pairs, 128), unet.PetDataset(pairs, 128, mirror=True)
    photo, mask = dataset[0]
    assert photo.shape == (3, 128, 128) and photo.dtype == torch.uint8 and len(photo.unique()) > 2
    assert mask.shape == (128, 128) and mask[:64].unique().tolist() == [0, 2] and mask[64:].eq(1).all()
    assert sum(tensor.untyped_storage().nbytes() for tensor in dataset.samples[0]) == 64 * 1024
    seen = [mirrored[0] for _ in range(100)]
    turned = sum(torch.equal(a, photo.flip(-1)) and torch.equal(b, mask.flip(-1)) for a, b in seen)
    kept = sum(torch.equal(a, photo) and torch.equal(b, mask) for a, b in seen)
    assert kept + turned == 100 and 25 < turned < 75 and torch.equal(dataset[0][0], photo)

def test_toy_drawings_are_pairs_and_those_of_the_test_are_others():
    pairs = unet.open_pairs("toy", "trainval") + unet.open_pairs("toy", "test")
    assert len({photo.tobytes() + trimap.tobytes() for photo, trimap in pairs}) == len(pairs) == 600
    for photo, trimap in pairs[:20]:
        photo.putalpha(trimap)
        colours = {label: rgb for _, (*rgb, label) in photo.getcolors()}
        assert len(photo.getcolors()) == 3 and colours[1] == colours[3] != colours[2]  # the border is pet

@pytest.mark.parametrize("loss, lr, base, size, epochs, batch_size, seed, rise, fall", [
    ("ce", 4e-3, 2, 32, 5, 4, 7, 3, 7), ("dice", 1e-2, 3, 48, 10, 3, 8, 9, 21)])
def test_train_is_the_textbook_loop(loss, lr, base, size, epochs, batch_size, seed, rise, fall):
    """With 8 of 10 photos; two are never learned, nor mirrored. The rate rises for 30 % of the steps."""
    write_pets()
    unet.train(loss=loss, lr=lr, base=base, size=size, epochs=epochs, batch_size=batch_size, seed=seed)
    saved, loaded = unet.load("unet.pt")
    parts = random_split(unet.open_pairs("data", "trainval"), (0.8, 0.2), torch.Generator().manual_seed(0))
    train_set, val_set = unet.PetDataset(parts[0], size, mirror=True), unet.PetDataset(parts[1], size)
    torch.manual_seed(seed)
    net, loss_fn = unet.UNet(3, 3, base), unet.LOSSES[loss]
    optimizer = torch.optim.AdamW(net.to(memory_format=unet.LAYOUT).parameters(), betas=(0.5, 0.99))
    rates = [lr / 25 + (lr - lr / 25) * k / (rise - 1) for k in range(rise)]
    rates = iter(rates + [lr / 25e4 + (lr - lr / 25e4) * k / fall for k in reversed(range(fall))])
    for row in saved["history"]:
        losses = []
        for photos, masks in DataLoader(train_set, batch_size, shuffle=True):
            optimizer.param_groups[0]["lr"] = next(rates)
            losses.append(loss_fn(unet.compute_logits(net.train(), photos), masks))
            net.zero_grad()
            losses[-1].backward()
            optimizer.step()
        wanted = {"train loss": torch.stack(losses).mean().item(), **unet.evaluate(net, val_set, loss_fn)}
        assert row == pytest.approx(wanted, rel=1e-3, nan_ok=True)
    assert not list(rates)  # all epochs are there
    torch.testing.assert_close(dict(loaded.state_dict()), dict(net.state_dict()), rtol=1e-4, atol=1e-6)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())

def test_a_stranger_gets_in_the_shell_what_a_call_gives(monkeypatch, capsys):
    """The same checkpoint, of plain values, and the same text, but for progress, which is for terminals."""
    words = "train --data toy --epochs 2 --size 32 --base 2 --batch-size 120 --loss dice --checkpoint a/1.pt"
    done = python(HERE / "unet.py", *words.split())
    monkeypatch.setattr(os, "rename", Mock(side_effect=OSError))  # on Windows it does not replace a file
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shell(words.replace("1.pt", "2.pt"))
    one, two = (torch.load(f"a/{name}.pt", weights_only=True) for name in (1, 2))  # runs no code
    assert all(torch.equal(value, two["model"][name]) for name, value in one.pop("model").items())
    assert one == {"base": 2, "size": 32, "loss": "dice", "history": two["history"]}
    assert sorted(os.listdir("a")) == ["1.pt", "2.pt"] and not done.stderr
    row = "epoch {} on cpu  train loss {train loss:.3f}  unseen loss {unseen loss:.3f}  mIoU {mIoU:.3f}"
    rows = [row.format(k, **scores) for k, scores in enumerate(one["history"], 1)]
    assert done.stdout.splitlines() == ["decoding 240 photos", "decoding 60 photos", *rows, "wrote a/1.pt"]
    steps = re.sub(r"  loss \d\.\d{3}\r", "|", capsys.readouterr().out)  # \r: the next is written over it
    assert steps == done.stdout.replace("1.pt", "2.pt").replace("epoch", "step 1 of 2|step 2 of 2|epoch")

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

@pytest.mark.filterwarnings("ignore:.*is a no-op")  # a meta tensor does not take a checkpoint's values
@pytest.mark.parametrize("words, first_value", [("train --data toy --size 32", "loss.item()"),
    ("test --data toy", ".item()"), ("show --data toy", ".cpu()"), ("predict cat.jpg", ".cpu()")])
def test_every_tensor_meets_on_the_device(words, first_value, trained, monkeypatch):
    """The meta device has shapes, but no values: on it a command must get as far as its first value."""
    unet.draw_pair("cat")[0].save("cat.jpg")
    os.rename("toy.pt", "unet.pt")
    monkeypatch.setattr(unet, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", MagicMock())
    stop = pytest.raises((RuntimeError, NotImplementedError), shell, words)
    last = [frame.line for frame in traceback.extract_tb(stop.tb) if frame.filename == unet.__file__][-1]
    assert stop.match(r"item\(\) cannot be called on meta|Cannot copy out of meta") and first_value in last
    assert [call.args[0] for call in torch.autocast.call_args_list] == ["meta"]

@pytest.mark.parametrize("words, values", [("test", ("data", "unet.pt")), ("show", ("data", "unet.pt")),
    ("predict a.jpg", ("a.jpg", "unet.pt")), ("train", ("data", "unet.pt", 5, 8, 128, 64, 4e-3, "ce", 0))])
def test_the_parameters_of_a_command_are_its_options(words, values, monkeypatch):
    run = functools.wraps(getattr(unet, words.split()[0]))(Mock())
    monkeypatch.setattr(unet, run.__name__, run)
    defaults = dict(zip(inspect.signature(run).parameters, values))
    shell(words)
    assert run.call_args.kwargs == defaults
    for name in defaults.keys() - {"photo"}:
        value = {int: 3, float: 0.5, str: "dice"}[type(defaults[name])]
        shell(f"{words} --{name.replace('_', '-')} {value}")
        assert run.call_args.kwargs == {**defaults, name: value}

def test_the_help_a_wrong_option_a_new_one_and_ctrl_c(monkeypatch, capsys):
    fails("train --help", "0")
    words = " ".join(capsys.readouterr().out.split())
    assert "--batch-size BATCH_SIZE photos in a step (default: 8)" in words and "(default: 0.004)" in words
    assert len(re.findall(r" [^()A-Z]{9,} \(default: ", words)) == 9  # each option has a meaning
    fails("train --loss nonsense", "2")
    for size in (100, 16, 0):
        pytest.raises(ValueError, unet.train, data="toy", size=size).match(f"multiple of 16.*{size}")
    def train(data="data", dropout=0.0):
        """A learner's own."""
        print(data, dropout)
        raise KeyboardInterrupt
    monkeypatch.setattr(unet, "train", train)
    fails("train --dropout 0.5", "stopped")
    printed = capsys.readouterr()
    assert printed.out == "data 0.5\n" and "choose from" in printed.err and not os.listdir()

def test_test_prints_loss_and_scores_of_the_test_photos(trained, capsys):
    write_pets(test=7)
    torch.save({**torch.load("toy.pt"), "loss": "dice"}, "dice.pt")
    test_set = unet.PetDataset(unet.open_pairs("data", "test"), 32)
    scores = unet.evaluate(unet.load("dice.pt")[1], test_set, unet.dice_loss)
    line = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
    shell("test --checkpoint dice.pt")
    assert capsys.readouterr().out == f"decoding 7 photos\ndecoding 7 photos\n{line}\n"

def test_show_draws_photos_truth_prediction_and_curves(trained, monkeypatch):
    write_pets(test=20)
    opened, saved, pets = [], {}, unet.datasets.OxfordIIITPet
    getitem = pets.__getitem__
    monkeypatch.setattr(pets, "__getitem__", lambda self, i: opened.append(i) or getitem(self, i))
    monkeypatch.setattr(unet.Figure, "savefig", lambda figure, path: saved.update({path: figure}))
    unet.show(checkpoint="toy.pt")
    assert 4 <= len(set(opened)) == len(opened) <= 6 and min(opened) < 10 <= max(opened)
    photos, truth = batch([getitem(unet.open_pairs("data", "test"), i) for i in opened], 32)
    prediction = unet.load("toy.pt")[1](photos).argmax(dim=1)
    assert 0.7 < (truth == prediction).float().mean() < 1  # it has learned, and errs
    pictures = (255 * photos).round().byte(), *unet.COLOURS[torch.stack((truth, prediction))].movedim(-1, 2)
    *rows, curves = saved["toy.png"].axes
    for axis, name, row in zip(rows, ("input", "ground truth", "prediction"), pictures):
        assert (axis.get_ylabel(), len(axis.get_xticks()), len(axis.get_yticks())) == (name, 0, 0)
        assert axis.images[0].get_array().tolist() == unet.utils.make_grid(row).movedim(0, -1).tolist()
    history, lines = torch.load("toy.pt")["history"], {line.get_label(): line for line in curves.lines}
    for name in ("train loss", "unseen loss", "mIoU"):
        assert lines[name].get_xydata().tolist() == [[k, row[name]] for k, row in enumerate(history, 1)]
    for name, rgb in unet.CLASSES.items():  # with edges, or near-white would not be seen
        assert [round(255 * value) for value in lines[name].get_color()] == [*rgb]
        assert lines[name].get_markeredgecolor() == "gray"
    assert [text.get_text() for text in saved["toy.png"].legends[0].get_texts()] == list(lines)
    assert curves.get_xlabel() == "epoch" and list(curves.get_xticks()) == [1, 2, 3]

def test_predict_resizes_logits_not_labels_and_draws_the_mask_over_the_upright_photo(trained, capsys):
    photo, exif = unet.draw_pair("a photo")[0], Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise, as the camera was held
    photo.transpose(Image.Transpose.ROTATE_90).convert("RGBA").save("caf\u00e9.c.png", exif=exif)
    shell("predict caf\u00e9.c.png --checkpoint toy.pt")
    assert capsys.readouterr().out == "wrote caf\u00e9.c-mask.png\n"
    logits = unet.load("toy.pt")[1](batch([unet.draw_pair("a photo")], 32)[0])
    classes = F.interpolate(logits, size=(160, 192), mode="bilinear").argmax(dim=1)[0]
    wanted = (unet.COLOURS[classes].movedim(-1, 0).float() + unet.pil_to_tensor(photo)) / 2
    drawn = unet.pil_to_tensor(Image.open("caf\u00e9.c-mask.png"))
    assert (drawn - wanted).abs().max() <= 1 and len(classes.unique()) > 1

def test_several_gpus_train_one_network():
    """README's several.py, with two workers on the CPU: they share the photos, and end with equal weights."""
    script = next(text for text in re.findall(r"```python\n(.*?)```", README, re.S) if "Distributed" in text)
    spy = 'torch.save((list(loader.sampler), net.module.final.weight), f"{distributed.get_rank()}.pt")\n'
    script = script.replace("size, base, epochs = 128, 64, 5", "size, base, epochs = 32, 2, 2")
    Path("several.py").write_text(script.replace("distributed.destroy", spy + "distributed.destroy"))
    words = "-m torch.distributed.run --standalone --max-restarts=1 --nproc_per_node=2 several.py toy".split()
    assert python(*words).stdout.count("loss ") == 2
    (share0, weight0), (share1, weight1) = torch.load("0.pt"), torch.load("1.pt")
    assert sorted(share0 + share1) == list(range(300)) and torch.equal(weight0, weight1)
    assert torch.equal(unet.load("unet.pt")[1].final.weight, weight0)

def test_what_is_missing_or_broken_is_named(trained, monkeypatch):
    folder = write_pets()
    photo, trimap = folder / "images/pet_13.jpg", folder / "annotations/trimaps/pet_13.png"
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch sprung'\ntR.")  # a pickle that would run a command
    unet.save("other.pt", edited(("(c1, out_classes, 1)", "(c1, 2, 1, bias=False)")).UNet(base=8), base=8)
    messages = {"evil": "weights_only|WeightsUnpickler", "other": r"Missing.*final.bias.*\s*size mismatch"}
    for words, name in itertools.product(("test", "show", f"predict {photo.as_posix()}"), messages):
        pytest.raises(Exception, shell, f"{words} --checkpoint {name}.pt").match(messages[name])
    for mode, label in (("L", 0), ("L", 4), ("L", 255), ("1", 0), ("RGB", (9, 9, 9)), ("I;16", 257)):
        Image.new(mode, (192, 160), label).save(trimap)
        pytest.raises(ValueError, unet.test, checkpoint="toy.pt").match("1-3: .*pet_13.png")
    for path in (trimap, photo):
        path.write_text("no picture")
        fails("test --checkpoint toy.pt", path.name)
    fails(f"predict {photo.as_posix()} --checkpoint toy.pt", photo.name)
    fails("predict none.jpg --checkpoint toy.pt", "none.jpg")
    fails("test --checkpoint none.pt", "none.pt")
    (folder / "annotations/test.txt").unlink()
    fails("test --checkpoint toy.pt", "test.txt", "README.md")
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no route to host")))
    fails("train --data new", "no route to host", "README.md")
    assert not {"sprung", "unet.pt"} & set(os.listdir()) and not list(Path().glob("*.p*g"))

def test_a_run_that_stops_leaves_the_old_checkpoint(monkeypatch):
    """A loss that is not finite, in training or validation; a learner's own mistake; a kill while saving."""
    write_pets()
    Path("unet.pt").write_text("precious")
    for in_training, value in itertools.product((True, False), (math.nan, math.inf)):
        loss_fn = lambda logits, target: logits.mean() * (value if logits.requires_grad == in_training else 1)
        monkeypatch.setitem(unet.LOSSES, "ce", loss_fn)
        pytest.raises(ValueError, shell, "train --size 32 --base 2").match("not finite.*lr")
    monkeypatch.setitem(unet.LOSSES, "ce", lambda logits, target: nn.CrossEntropyLoss()(logits, target[0]))
    pytest.raises(ValueError, shell, "train --size 32 --base 2").match("batch_size")  # with its traceback
    monkeypatch.setattr(torch, "save", lambda checkpoint, path: sys.exit(Path(path).write_bytes(b"half")))
    fails("train --size 32 --base 2 --loss dice")
    assert Path("unet.pt").read_text() == "precious"

def edits_of(row):
    """The edits of a row of README's tables: (old, new, times). "and so on to 1": with ever lower numbers."""
    number = re.compile(r"\b([a-e])(\d)\b")
    for old, new, twice, last in re.findall(r"`([^`]+)` → `([^`]+)`( twice)?(?: and so on to (\d))?", row):
        lower = lambda code, by: number.sub(lambda found: found[1] + str(int(found[2]) - by), code)
        for by in range(min(int(digit) for _, digit in number.findall(old)) - int(last) + 1 if last else 1):
            yield lower(old, by), lower(new, by), 2 if twice else 1

def outcome(row=""):
    """All that an edit can change in a tiny run of the page: what it saves, and the logits after loading."""
    page = edited(("range(300)", "range(12)"), *[(old, new) for old, new, _ in edits_of(row)])
    options = " ".join(re.findall(r"`(--[^`]+)`", row))
    shell(f"train --data toy --epochs 2 --size 32 --base 2 --batch-size 4 {options}", page)
    saved, net = page.load("unet.pt")
    photos = next(iter(DataLoader(page.PetDataset(DRAWINGS[:2], 32), 2)))[0]
    tensors = {**saved.pop("model"), "logits": page.compute_logits(net, photos)}
    return saved, {name: tensor.tolist() for name, tensor in tensors.items()}

@pytest.mark.parametrize("row", re.findall(r"^\|.*(?:→|`--).*$", README, re.M))
def test_each_row_of_the_readme_fits_the_page_and_changes_what_it_learns(row, usual=[]):
    """The code before an arrow stands on the page as often as the row says, and the edit makes a difference."""
    for old, _, times in edits_of(row):
        assert PAGE.count(old) == times, old
    if "`IndexError" in row:
        with pytest.raises(IndexError, match="Target 3 is out of bounds"):
            outcome(row)
        return
    usual.extend([outcome()] * (not usual))
    assert str(outcome(row)) != str(usual[0])
