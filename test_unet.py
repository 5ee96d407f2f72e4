"""Examples that explain unet.py, in its order. Run them with `python -m pytest`."""
import inspect, math, pickle, re, shutil, sys
from pathlib import Path
from runpy import run_path
from unittest.mock import MagicMock, Mock

import pytest, torch, torchvision, unet
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset

unet.DEVICE, unet.BF16 = torch.device("cpu"), False  # no test needs a GPU
torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def fresh_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # any other seed does as well

def toys(count):
    return unet.PetDataset(unet.open_pairs("toy", "test")[:count], size=32)

def pictures(dataset):
    return {image.numpy().tobytes() for image, mask in dataset.samples}

# -------- data --------
def test_no_toy_is_in_both_training_and_test():
    training = unet.PetDataset(unet.open_pairs("toy", "trainval"), 32)

    assert not pictures(training) & pictures(toys(300))

def two_pixels():
    """A pair of red beside black, which is pet beside border."""
    image = Image.frombytes("RGB", (2, 1), bytes([255, 0, 0, 0, 0, 0]))
    return image, Image.frombytes("L", (2, 1), bytes([1, 3]))

def test_a_sample_is_an_image_from_0_to_1_and_a_mask_of_classes():
    image, mask = unet.PetDataset([two_pixels()], 2)[0]

    assert (image.dtype, mask.dtype) == (torch.float32, torch.int64)
    assert image[:, 0].tolist() == [[1, 0], [0, 0], [0, 0]]  # red, green, blue
    assert mask[0].tolist() == [0, 2]  # pet, border

def test_resizing_a_mask_makes_no_new_classes():
    """The mean of pet and border would be background."""
    image, mask = unet.PetDataset([two_pixels()], 3)[0]

    assert mask.unique().tolist() == [0, 2]  # pet, border

def test_mirroring_turns_image_and_mask_together():
    """If only the image is turned, the network learns wrong edges, and no error tells."""
    dataset = unet.PetDataset([two_pixels()], 2, mirror=True)

    samples = [dataset[0] for _ in range(40)]

    left = {(image[0, 0, 0].item(), mask[0, 0].item()) for image, mask in samples}
    assert left == {(1, 0), (0, 2)}  # red with pet, or black with border

@pytest.mark.parametrize("label", [0, 4, 255])
def test_a_label_without_a_class_is_refused_with_its_file(label):
    Image.new("L", (2, 2), label).save("trimap.png")

    with pytest.raises(ValueError, match=f"trimap.png.*{label}"):
        unet.PetDataset([(Image.new("RGB", (2, 2)), Image.open("trimap.png"))], 2)

def test_a_lost_pair_is_not_the_end_of_the_data():
    """A plain loop would stop at an IndexError, and train on fewer images without a word."""
    with pytest.raises(IndexError):
        unet.PetDataset(Subset([two_pixels()], [0, 1]), 2)  # there is no second pair

# -------- model --------
def test_an_image_becomes_logits_of_its_own_size():
    net = unet.UNet(in_channels=1, out_classes=5, base=2)

    assert net(torch.zeros(2, 1, 32, 48)).shape == (2, 5, 32, 48)

def test_the_shapes_of_all_layers_on_the_page_are_true():
    """Run each line of forward, as `e1 = self.enc1(x)  # (N, 64, 128, 128)`, and compare."""
    source = inspect.getsource(unet.UNet.forward)
    lines = re.findall(r"(\w+)(?: =)? ([^:\n]+?) +# \(N, +(\d+), +(\d+), +(\d+)\)", source)
    drawing = re.findall(r"([edb])\w+?(\d?)  (\(.+?\))", unet.__doc__)  # enc1 is e1
    found = {"torch": torch, "self": unet.UNet(base=64), "x": torch.zeros(1, 3, 128, 128)}

    assert len(lines) == 18 and len(drawing) == 9
    for name, code, *shape in lines:
        found[name] = eval(code, found)
        assert found[name].shape == (1, *map(int, shape)), code
    for letter, level, shape in drawing:
        assert shape == str(tuple(found[letter + level].shape[1:]))

def test_a_block_is_convolution_batchnorm_relu_twice():
    layers = [type(layer).__name__ for layer in unet.conv_block(3, 5)]

    assert layers == 2 * ["Conv2d", "BatchNorm2d", "ReLU"]

def test_pooling_keeps_the_largest_of_2x2():
    assert unet.UNet(base=1).pool(torch.tensor([[[4.0, 5, 1, 3]] * 2])).tolist() == [[[5, 3]]]

def test_the_last_layer_classifies_each_pixel_by_itself():
    assert unet.UNet(base=1).final.kernel_size == (1, 1)

def run_and_record(net, images):
    """Run the network. Each of its parts keeps its input and its output."""
    def record(part, inputs, output):
        part.input, part.output = inputs[0], output

    for part in net.children():
        part.register_forward_hook(record)
    net(images)

@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_decoder_block_gets_the_skip_beside_the_upsampled_channels(level):
    """Red if you cut or detach a skip, as in `0 * e4`."""
    net = unet.UNet(base=2)
    run_and_record(net, torch.randn(1, 3, 32, 32))

    previous = net.bottleneck if level == 4 else net.get_submodule(f"dec{level + 1}")
    up, enc, dec = [net.get_submodule(f"{part}{level}") for part in ("up", "enc", "dec")]
    assert torch.equal(up.input, previous.output)
    assert torch.equal(dec.input, torch.cat((up.output, enc.output), dim=1))
    assert torch.equal(net.final.input, net.dec1.output)

    upsampled, skip = dec.input.chunk(2, dim=1)
    assert (torch.autograd.grad(skip.sum(), enc.output)[0] == 1).all()  # 0 if detached

@pytest.mark.parametrize("part, width", [("enc1", 5), ("enc2", 14), ("bottleneck", 140)])
def test_how_far_a_level_sees(part, width):
    """A number depends on a pixel if its gradient there is not 0."""
    net, image = unet.UNet(base=1).eval(), torch.rand(1, 3, 256, 256, requires_grad=True)
    for weights in net.parameters():
        weights.data.abs_()  # so that no ReLU gives 0
    net.pool = nn.AvgPool2d(2)  # MaxPool2d passes the gradient to one of the four alone

    run_and_record(net, image)
    output = net.get_submodule(part).output
    output[0, 0, output.shape[2] // 2, output.shape[3] // 2].backward()  # in the middle

    columns = image.grad[0].sum(dim=(0, 1)).nonzero()  # over colours and rows
    assert columns.max() - columns.min() + 1 == width

# -------- training --------
@pytest.mark.parametrize("fast", [True, False])
def test_convolutions_use_bfloat16_if_the_cpu_is_fast_at_it(fast, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    page, layer, dtypes = run_path(unet.__file__), nn.Conv2d(3, 3, 1), []  # BF16 is set at import
    layer.register_forward_hook(lambda layer, images, logits: dtypes.append(logits.dtype))

    page["train_epoch"](layer, DataLoader(toys(1)), torch.optim.SGD(layer.parameters()), Mock())
    page["evaluate"](layer, toys(1))

    assert dtypes == 2 * [torch.bfloat16 if fast else torch.float32]

def test_cross_entropy_by_hand():
    """Two pixels. Their true classes, 0 and 1, have the probabilities 0.6 and 0.5."""
    probabilities = torch.tensor([[[0.6, 0.3], [0.2, 0.5], [0.2, 0.2]]])  # a column for each pixel

    loss = unet.loss_fn(probabilities.log(), torch.tensor([[0, 1]]))  # softmax undoes the log

    assert loss.item() == pytest.approx((-math.log(0.6) - math.log(0.5)) / 2)

def train_at_constant_rate(net, loader, lr=0.0):
    """An epoch at a constant learning rate. At 0, the network stays as it is."""
    optimizer = torch.optim.SGD(net.parameters(), lr)
    return unet.train_epoch(net, loader, optimizer, schedule=Mock())

def test_gradients_do_not_pile_up():
    """Red without zero_grad: the second step on an image would have twice the gradient."""
    layer, loader = nn.Conv2d(3, 3, 1), DataLoader(toys(1))

    train_at_constant_rate(layer, loader)
    once = layer.weight.grad.clone()
    train_at_constant_rate(layer, loader)

    assert torch.equal(layer.weight.grad, once)

def test_an_epoch_returns_its_mean_loss():
    """At a learning rate of 0, it is what evaluate returns. The second batch is smaller."""
    layer = nn.Conv2d(3, 3, 1)

    loss = train_at_constant_rate(layer, DataLoader(toys(3), batch_size=2))

    assert loss == pytest.approx(unet.evaluate(layer, toys(3))[0], rel=1e-5)

def test_four_images_are_memorized():
    """If a network cannot memorize four images, suspect the code and not the data."""
    net, loader = unet.UNet(base=8), DataLoader(toys(4), batch_size=4)

    for epoch in range(100):
        train_at_constant_rate(net, loader, lr=0.5)

    loss, iou = unet.evaluate(net, loader.dataset)
    assert loss < 0.1 and iou.min() > 0.9

def row(prediction, mask):
    """A sample whose image is the logits of `prediction`, for nn.Identity to return."""
    image = nn.functional.one_hot(torch.tensor([prediction]), 3).movedim(-1, 0).float()  # (3, 1, W)
    return image, torch.tensor([mask])

def test_iou_by_hand():
    loss, iou = unet.evaluate(nn.Identity(), [row(prediction=[0, 1, 1, 1], mask=[0, 0, 1, 1])])

    assert iou[0] == pytest.approx(1 / 2)  # one pixel in both, two in at least one
    assert iou[1] == pytest.approx(2 / 3)  # two in both, three in at least one
    assert iou[2].isnan()  # it is nowhere

def test_scores_are_over_all_pixels_and_not_over_batches():
    """After eight batches of eight, the last image is alone, but counts like the others."""
    right, wrong = row([0, 1], [0, 1]), row([1, 0], [0, 1])

    loss, iou = unet.evaluate(nn.Identity(), 64 * [right] + [wrong])

    right_loss, wrong_loss = [unet.evaluate(nn.Identity(), [one])[0] for one in (right, wrong)]
    assert iou[0] == pytest.approx(64 / 66)  # the wrong image adds two pixels to the union
    assert loss == pytest.approx((64 * right_loss + wrong_loss) / 65)

def test_batchnorm_learns_its_averages_in_training_alone():
    """Red without net.train() or net.eval()."""
    net = unet.UNet(base=1)

    unet.evaluate(net, toys(1))
    assert (net.enc1[1].running_mean == 0).all()

    train_at_constant_rate(net, DataLoader(toys(1)))
    assert (net.enc1[1].running_mean != 0).any()

@pytest.fixture
def dry_run(monkeypatch):
    """Runs train without training. Returns its loader, its schedule and its validation set."""
    iou = torch.tensor([0.5, math.nan, 1.0])  # the background is nowhere
    monkeypatch.setattr(unet, "train_epoch", Mock(return_value=2.0))
    monkeypatch.setattr(unet, "evaluate", Mock(return_value=(1.0, iou)))

    def run(data="toy", **options):
        unet.train(data, size=16, base=1, **options)
        _, loader, _, schedule = unet.train_epoch.call_args.args
        _, val_set = unet.evaluate.call_args.args
        return loader, schedule, val_set
    return run

def test_validation_images_are_never_trained_on(dry_run):
    """Otherwise the validation loss is good even if the network memorizes."""
    loader, schedule, val_set = dry_run()

    everything = pictures(unet.PetDataset(unet.open_pairs("toy", "trainval"), 16))
    assert pictures(loader.dataset) == everything - pictures(val_set)
    assert len(loader.dataset) > len(val_set) > 0

def test_the_split_is_random_but_the_same_for_every_seed(dry_run):
    """Pets are sorted by breed: a slice would be breeds that were never trained on."""
    _, _, one = dry_run(seed=1)
    _, _, two = dry_run(seed=2)

    half = unet.PetDataset(unet.open_pairs("toy", "trainval")[:150], 16)
    assert pictures(one) == pictures(two) and 0 < len(pictures(one) & pictures(half)) < len(one)

def test_training_images_are_shuffled_and_only_they_are_mirrored(dry_run):
    loader, schedule, val_set = dry_run(batch_size=7)

    images, masks = next(iter(loader))
    assert images.shape == (7, 3, 16, 16)
    assert isinstance(loader.sampler, RandomSampler)
    assert loader.dataset.mirror and not val_set.mirror

def test_the_learning_rate_rises_to_lr_and_falls_almost_to_0(dry_run):
    loader, schedule, val_set = dry_run(epochs=3, lr=0.02, batch_size=6)

    rates = []
    for _ in range(3 * len(loader)):
        rates += schedule.get_last_lr()
        schedule.optimizer.step()  # without it, the schedule warns
        schedule.step()

    assert max(rates) == pytest.approx(0.02, rel=0.1)  # the peak may be between two steps
    assert rates[0] < 0.002 and rates[-1] < 0.002
    settings, defaults = schedule.optimizer.param_groups[0], schedule.optimizer.defaults
    assert settings.get("momentum") == defaults.get("momentum")  # OneCycleLR could cycle it

def test_photos_come_from_the_folder_and_the_split_that_are_asked_for(dry_run, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.OxfordIIITPet", Mock(return_value=9 * [two_pixels()]))

    dry_run(data=Path("pets"))  # the checkpoint has "pets", as torch.load would refuse a Path
    unet.test(checkpoint="unet.pt")

    asked = [call.args for call in torchvision.datasets.OxfordIIITPet.call_args_list]
    assert asked == [(Path("pets"), "trainval", "segmentation"), ("pets", "test", "segmentation")]

def test_an_interrupted_run_keeps_its_finished_epochs(dry_run, monkeypatch):
    def save(saved, path):
        if len(saved["losses"]) == 3:
            Path(path).write_text("half")
            raise KeyboardInterrupt  # Ctrl-C
        torch.serialization.save(saved, path)  # the real torch.save

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        dry_run(epochs=5)

    assert torch.load("unet.pt")["losses"] == 2 * [(2.0, 1.0)]  # training, validation

def test_the_seed_decides_the_network():
    def train(seed):
        unet.train("toy", epochs=1, size=16, base=1, seed=seed)
        return torch.load("unet.pt")["model"]["final.weight"]

    assert torch.equal(train(seed=1), train(seed=1))
    assert not torch.equal(train(seed=1), train(seed=2))

# -------- using it: here as a shell would, on one network for all tests --------
def shell(words, *more):
    sys.argv = ["unet.py", *words.split(), *map(str, more)]
    unet.main()

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The checkpoint of a small network that was trained on 240 toys."""
    path = tmp_path_factory.mktemp("trained") / "new/toy.pt"  # train makes the folder
    shell("train --data toy --epochs 5 --size 32 --base 9 --lr 3e-3 --batch-size 8 --checkpoint",
          path)
    return path

def test_five_epochs_are_enough_for_new_toys(trained):
    """Red without schedule.step, which leaves the learning rate as low as it starts."""
    loss, iou = unet.evaluate(unet.load(trained)[1], toys(300))

    assert iou.min() > 0.6  # the border is the hardest class

def test_a_loaded_network_is_in_evaluation_mode(trained):
    """In training mode, a prediction would depend on the other images of its batch."""
    assert not unet.load(trained)[1].training

def test_train_and_test_print_the_mean_over_the_classes_that_occur(trained, dry_run, capsys):
    dry_run(epochs=1)  # from here on, evaluate returns 0.5, nan, 1.0
    shell("test --checkpoint", trained)

    printed = capsys.readouterr().out
    assert printed.count("mIoU 0.750") == 2  # (1/2 + 1) / 2, as the background is nan
    assert "Dice 0.833" in printed  # (2/3 + 1) / 2
    assert "pet 0.500" in printed and "border 1.000" in printed

def test_show_draws_images_masks_predictions_and_losses(trained, monkeypatch):
    figure = Figure(layout="constrained")
    monkeypatch.setattr(unet, "Figure", lambda **options: figure)

    shell("show --checkpoint", trained)

    saved, net = unet.load(trained)
    images, masks = next(iter(DataLoader(Subset(toys(300), range(0, 300, 50)), batch_size=6)))
    rows = {"image": images, "ground truth": unet.COLOURS[masks].movedim(-1, 1),
            "prediction": unet.COLOURS[net(images).argmax(dim=1)].movedim(-1, 1)}
    for axis, title in zip(figure.axes, rows):
        grid = torchvision.utils.make_grid(rows[title], nrow=6).movedim(0, -1)
        assert (axis.images[0].get_array() == grid.numpy()).all()
        assert [axis.get_title(), *axis.get_xticks(), *axis.get_yticks()] == [title]  # no ticks

    training, validation, *legend = figure.axes[3].lines
    assert training.get_label() == "train loss" and list(training.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(zip(training.get_ydata(), validation.get_ydata())) == saved["losses"]
    assert {mark.get_label(): tuple(mark.get_color() * 255) for mark in legend} == unet.CLASSES
    assert len(unet.COLOURS.unique(dim=0)) == 3  # each class has a colour of its own
    assert trained.with_suffix(".png").exists()

def test_predict_draws_the_classes_over_the_upright_photo(trained):
    """A turned camera notes it in EXIF. Logits are enlarged, as classes would have stairs."""
    toy, trimap = unet.open_pairs("toy", "test")[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned, so the photo must be turned clockwise
    toy.transpose(Image.Transpose.ROTATE_90).convert("RGBA").save("toy.png", exif=exif)

    shell("predict toy.png --checkpoint", trained)

    saved, net = unet.load(trained)
    image, mask = toys(1)[0]
    logits = nn.functional.interpolate(net(image[None]), toy.size[::-1], mode="bilinear")
    colours = Image.fromarray(unet.COLOURS[logits.argmax(dim=1)[0]].numpy())
    assert Image.open("toy-overlay.png").tobytes() == Image.blend(toy, colours, 0.5).tobytes()

@pytest.mark.parametrize("words, message", [
    ("train", "no route"),  # to download the photos, see below
    ("test --checkpoint toy.pt --data elsewhere", "no route"),
    ("show --checkpoint toy.pt --data elsewhere", "no route"),
    ("train --data toy --size 40", "40"),
    ("test --checkpoint none.pt", "none.pt"),
    ("predict toy.pt --checkpoint toy.pt", "toy.pt"),  # no image
    ("predict deep.png --checkpoint toy.pt", "deep.png"),
    ("test --epochs 1 --checkpoint toy.pt", "2")])  # the exit status of argparse
def test_a_mistake_ends_without_a_traceback(words, message, trained, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no route")))
    Image.new("I;16", (32, 32)).save("deep.png")  # 16 bits, of which Pillow would keep 8
    shutil.copy(trained, "toy.pt")

    with pytest.raises(SystemExit, match=rf"\A.*{message}.*\Z"):  # a dot matches no line break
        shell(words)

@pytest.mark.filterwarnings("ignore:.*is a no-op")  # a meta tensor takes no saved values
@pytest.mark.parametrize("words", ["train --data toy --size 16", "test", "show", "predict toy"])
def test_all_tensors_are_on_the_device(trained, words, monkeypatch):
    """Meta tensors have no values. Reading one fails, and that alone may fail."""
    unet.draw_toy("0")[0].save("toy", "png")
    monkeypatch.setattr(unet, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(unet, "loss_fn", Mock(return_value=torch.ones((), requires_grad=True)))
    monkeypatch.setattr(torch, "autocast", MagicMock())  # it does not know the meta device

    with pytest.raises((RuntimeError, TypeError), match="meta tensor|Tensor.__format__"):
        shell(f"{words} --checkpoint", shutil.copy(trained, "unet.pt"))
    assert all(tensor.is_meta for call in unet.loss_fn.call_args_list for tensor in call.args)

def test_a_checkpoint_cannot_run_a_command():
    torch.save(print, "evil.pt")  # any function, such as os.system

    with pytest.raises(pickle.UnpicklingError):
        unet.load("evil.pt")
