"""Examples that explain unet.py, in its order. Run them with `python -m pytest`."""
import math, re
from inspect import getsource
from types import SimpleNamespace
from unittest.mock import Mock

import pytest, torch, unet
from PIL import Image
from torch import nn
from torch.nn import functional as F

unet.DEVICE = torch.device("cpu")  # no test needs a GPU
torch.set_num_threads(1)
SEED = 0  # any other does as well
PET, BORDER = 0, 2

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(SEED)

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The checkpoint of a small network that has learned 240 toys."""
    path = tmp_path_factory.mktemp("trained") / "toy.pt"
    unet.train("toy", path, epochs=5, size=32, base=9, lr=3e-3, seed=SEED)
    return path

def toys(count):
    """A dataset of so many toys, 32 pixels wide."""
    return unet.PetDataset(unet.open_pairs("toy", "test")[:count], 32)

def batch(dataset):
    """All images (N, 3, H, W) and masks (N, H, W)."""
    return next(iter(unet.DataLoader(dataset, len(dataset))))

# -------- data --------
def write_pet(folder, split, label):
    """A photo and its trimap, in the layout of the Oxford-IIIT Pets."""
    for part in ("images", "annotations/trimaps"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / f"images/{split}_1.jpg")
    Image.new("L", (40, 30), label).save(folder / f"annotations/trimaps/{split}_1.png")
    (folder / f"annotations/{split}.txt").write_text(f"{split}_1 1 1 1\n")

def test_training_and_test_have_their_own_photos(tmp_path):
    """If they share photos, the test scores are too good."""
    write_pet(tmp_path / "oxford-iiit-pet", "trainval", label=1)
    write_pet(tmp_path / "oxford-iiit-pet", "test", label=2)

    [(_, trimap)] = unet.open_pairs(tmp_path, "trainval")
    [(_, test_trimap)] = unet.open_pairs(tmp_path, "test")

    assert trimap.getpixel((0, 0)) == 1
    assert test_trimap.getpixel((0, 0)) == 2

def test_no_toy_is_in_both_training_and_test():
    training = {image.tobytes() for image, trimap in unet.open_pairs("toy", "trainval")}
    test = {image.tobytes() for image, trimap in unet.open_pairs("toy", "test")}

    assert not training & test

def two_pixels():
    """Red beside black, which is pet beside border."""
    image, trimap = Image.new("RGB", (2, 1)), Image.new("L", (2, 1))
    image.putdata([(255, 0, 0), (0, 0, 0)])
    trimap.putdata([1, 3])
    return image, trimap

def test_a_sample_is_an_image_from_0_to_1_and_a_mask_of_classes():
    image, mask = unet.PetDataset([two_pixels()], 2)[0]

    assert image.dtype == torch.float32
    assert image[:, 0].tolist() == [[1, 0], [0, 0], [0, 0]]  # RGB
    assert mask.dtype == torch.int64
    assert mask[0].tolist() == [PET, BORDER]

def test_resizing_a_mask_makes_no_new_classes():
    """The mean of pet and border would be background."""
    image, mask = unet.PetDataset([two_pixels()], 3)[0]

    assert mask.unique().tolist() == [PET, BORDER]

def test_mirroring_turns_image_and_mask_together():
    """If only the image is turned, the network learns wrong edges, and no error tells."""
    dataset = unet.PetDataset([two_pixels()], 2, mirror=True)

    samples = [dataset[0] for _ in range(40)]

    red_left = [image[0, 0, 0].item() == 1 for image, mask in samples]
    pet_left = [mask[0, 0].item() == PET for image, mask in samples]
    assert red_left == pet_left
    assert set(red_left) == {True, False}

@pytest.mark.parametrize("label", [0, 4, 255])
def test_a_label_without_a_class_is_refused_with_its_file(label):
    Image.new("L", (2, 2), label).save("trimap.png")
    pair = Image.new("RGB", (2, 2)), Image.open("trimap.png")

    with pytest.raises(ValueError, match=f"trimap.png.*{label}"):
        unet.PetDataset([pair], 2)

# -------- model --------
def run_and_record(net, images):
    """Run the network. Each of its parts keeps its input and its output."""
    def record(part, inputs, output):
        part.input, part.output = inputs[0], output

    for part in net.children():
        part.register_forward_hook(record)
    return net(images)

def test_every_shape_comment_of_forward_is_true():
    net = unet.UNet(base=64)
    run_and_record(net, torch.zeros(1, 3, 128, 128))

    shapes = [net.enc1.input.shape]
    for name, part in net.named_children():  # in the order of forward
        if name.startswith("dec"):
            shapes.append(part.input.shape)
        if name != "pool":
            shapes.append(part.output.shape)
    comments = re.findall(r"# \(N, +(\d+), +(\d+), +(\d+)\)", getsource(net.forward))

    assert [(1, *map(int, comment)) for comment in comments] == shapes

def test_a_block_is_convolution_batchnorm_relu_twice():
    block, x = unet.conv_block(3, 5), torch.randn(2, 3, 8, 8)

    y = x
    for convolution in (block[0], block[3]):
        y = F.conv2d(y, convolution.weight, padding=1)
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
        y = ((y - mean) / variance.sqrt()).clamp(min=0)

    assert torch.allclose(block(x), y, atol=1e-3)

def test_pooling_keeps_the_largest_of_2x2():
    image = torch.tensor([[[[0.0, 1.0], [2.0, 5.0]]]])

    assert unet.UNet(base=1).pool(image).tolist() == [[[[5.0]]]]

def test_a_decoder_block_gets_the_skip_beside_the_upsampled_channels():
    """Red if you cut a skip, as in `0 * e4`."""
    net = unet.UNet(base=2)
    run_and_record(net, torch.randn(1, 3, 32, 32))

    below = net.bottleneck
    for up, skip, dec in ((net.up4, net.enc4, net.dec4), (net.up3, net.enc3, net.dec3),
                          (net.up2, net.enc2, net.dec2), (net.up1, net.enc1, net.dec1)):
        assert torch.equal(up.input, below.output)
        assert torch.equal(dec.input, torch.cat((up.output, skip.output), dim=1))
        below = dec
    assert torch.equal(net.final.input, below.output)

@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_skip_passes_gradients_to_its_encoder(level):
    """Red if you cut or detach a skip. With zero weights in up, no other way is left."""
    net = unet.UNet(base=2)
    net.get_submodule(f"up{level}").weight.data.zero_()

    net(torch.randn(2, 3, 32, 32)).square().sum().backward()

    assert net.get_submodule(f"enc{level}")[0].weight.grad.abs().max() > 0

@pytest.mark.parametrize("part, width", [("enc1", 5), ("enc2", 14), ("bottleneck", 140)])
def test_how_far_a_level_sees(part, width):
    """A number depends on a pixel if its gradient there is not 0."""
    net, image = unet.UNet(base=4).eval(), torch.rand(1, 3, 256, 256, requires_grad=True)
    run_and_record(net, image)
    output = net.get_submodule(part).output

    output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum().backward()  # in the middle

    columns = image.grad[0].abs().sum(dim=(0, 1)).nonzero()  # over colours and rows
    assert columns.max() - columns.min() + 1 == width

def test_other_numbers_of_channels_and_classes():
    net = unet.UNet(in_channels=1, out_classes=5, base=2)

    assert net(torch.zeros(2, 1, 32, 48)).shape == (2, 5, 32, 48)

# -------- training --------
def test_cross_entropy_by_hand():
    """Two pixels. Their true classes, 0 and 1, have the probabilities 0.6 and 0.5."""
    probabilities = torch.tensor([[[0.6, 0.3], [0.2, 0.5], [0.2, 0.2]]])  # (1, classes, pixels)
    masks = torch.tensor([[0, 1]])

    loss = unet.loss_fn(probabilities.log(), masks)  # softmax undoes the log

    assert loss.item() == pytest.approx((-math.log(0.6) - math.log(0.5)) / 2)

def constant_rate(optimizer):
    """A schedule that leaves the learning rate as it is."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)

def train_one_layer(loader):
    """An epoch with a learning rate of 0, so that the layer stays as it is."""
    torch.manual_seed(SEED)
    layer = nn.Conv2d(3, 3, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0)
    schedule = constant_rate(optimizer)

    loss = unet.train_epoch(layer, loader, optimizer, schedule)
    return layer, loss, schedule

def test_gradients_do_not_pile_up():
    """Red without zero_grad: a second step on the same image would have twice the gradient."""
    [sample] = toys(1)

    once, _, _ = train_one_layer(unet.DataLoader([sample]))
    twice, _, _ = train_one_layer(unet.DataLoader([sample, sample]))

    assert torch.allclose(twice.weight.grad, once.weight.grad)

def test_an_epoch_returns_its_mean_loss_and_steps_the_schedule():
    """At a learning rate of 0, the loss is what evaluate returns. The second batch is smaller."""
    layer, loss, schedule = train_one_layer(unet.DataLoader(toys(3), batch_size=2))

    assert loss == pytest.approx(unet.evaluate(layer, toys(3))[0])
    assert schedule.last_epoch == 2  # the number of steps

def test_four_images_are_learned_by_heart():
    """If a network cannot learn four images, suspect the code and not the data."""
    net, loader = unet.UNet(base=8), unet.DataLoader(toys(4), 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

    for epoch in range(100):
        unet.train_epoch(net, loader, optimizer, constant_rate(optimizer))

    loss, iou = unet.evaluate(net, loader.dataset)
    assert loss < 0.1
    assert iou.min() > 0.9

def row(prediction, mask):
    """An image that is its own logits, so that nn.Identity predicts `prediction`, and a mask."""
    image = F.one_hot(torch.tensor([prediction]), 3).movedim(-1, 0).float()  # (3, 1, W)
    return image, torch.tensor([mask])

def test_iou_by_hand():
    dataset = [row(prediction=[0, 1, 1, 1], mask=[0, 0, 1, 1])]

    loss, iou = unet.evaluate(nn.Identity(), dataset)

    assert iou[0] == pytest.approx(1 / 2)  # one pixel in both, two in at least one
    assert iou[1] == pytest.approx(2 / 3)  # two in both, three in at least one
    assert iou[2].isnan()  # it is nowhere

def test_scores_are_over_all_pixels_and_not_over_batches():
    """The last of 65 images is alone in its batch, but counts like each of the others."""
    right, wrong = row([0, 1], [0, 1]), row([1, 0], [0, 1])

    loss, iou = unet.evaluate(nn.Identity(), 64 * [right] + [wrong])

    right_loss, _ = unet.evaluate(nn.Identity(), [right])
    wrong_loss, _ = unet.evaluate(nn.Identity(), [wrong])
    assert iou[0] == pytest.approx(64 / 66)  # the wrong image adds two pixels to the union
    assert loss == pytest.approx((64 * right_loss + wrong_loss) / 65)

def test_batchnorm_learns_its_averages_in_training_alone():
    """Red without net.train() or net.eval()."""
    net = unet.UNet(base=1)
    average = net.enc1[1].running_mean
    optimizer = torch.optim.SGD(net.parameters())

    unet.evaluate(net, toys(1))
    assert (average == 0).all()

    unet.train_epoch(net, unet.DataLoader(toys(1)), optimizer, constant_rate(optimizer))
    assert (average != 0).any()

@pytest.fixture
def dry_run(monkeypatch):
    """Runs train on ten grey images, 0, 10, ... 90. Returns what train_epoch and evaluate got."""
    def run(**options):
        received = SimpleNamespace()

        def open_greys(data, split):
            assert split == "trainval"
            return [(Image.new("RGB", (4, 4), (k, k, k)), Image.new("L", (4, 4), 1))
                    for k in range(0, 100, 10)]

        def train_epoch(net, loader, optimizer, schedule):
            received.loader, received.optimizer, received.schedule = loader, optimizer, schedule
            return 1.0

        def evaluate(net, dataset):
            received.val_set = dataset
            return 1.0, torch.ones(3)

        monkeypatch.setattr(unet, "open_pairs", open_greys)
        monkeypatch.setattr(unet, "train_epoch", train_epoch)
        monkeypatch.setattr(unet, "evaluate", evaluate)
        unet.train(size=16, base=1, **options)
        return received
    return run

def greys(dataset):
    return [round(image[0, 0, 0].item() * 255) for image, mask in dataset]

def test_validation_images_are_never_trained_on(dry_run):
    """Otherwise the validation loss is good even if the network learns by heart."""
    received = dry_run()

    both = greys(received.loader.dataset) + greys(received.val_set)
    assert sorted(both) == list(range(0, 100, 10))  # each image once

def test_the_split_is_random_but_the_same_for_every_seed(dry_run):
    """Pets are sorted by breed: the last images would be breeds that were never trained on."""
    one, two = greys(dry_run(seed=1).val_set), greys(dry_run(seed=2).val_set)

    assert one == two
    assert sorted(one) not in ([0, 10], [80, 90])

def test_only_training_images_are_mirrored(dry_run):
    received = dry_run()

    assert received.loader.dataset.mirror
    assert not received.val_set.mirror

def test_training_images_come_in_another_order_each_epoch(dry_run):
    """In the order of breeds, the network would forget the first ones."""
    loader = dry_run(batch_size=8).loader

    first, masks = next(iter(loader))
    second, masks = next(iter(loader))

    assert first.shape == (8, 3, 16, 16)
    assert not torch.equal(first, second)

def test_the_learning_rate_rises_to_lr_and_falls_almost_to_0(dry_run):
    received = dry_run(epochs=3, batch_size=1, lr=0.02)

    rates = []
    for _ in range(3 * len(received.loader)):
        rates.append(received.optimizer.param_groups[0]["lr"])
        received.optimizer.step()  # without it, the schedule warns
        received.schedule.step()

    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(0.02, rel=0.1)  # the peak is between two steps
    assert max(rates[0], rates[-1]) < 0.002

def test_an_interrupted_run_keeps_its_finished_epochs(monkeypatch):
    iou = torch.ones(3)
    results = [(3.0, iou), (2.0, iou), KeyboardInterrupt]  # Ctrl-C in the third epoch
    monkeypatch.setattr(unet, "evaluate", Mock(side_effect=results))

    with pytest.raises(KeyboardInterrupt):
        unet.train("toy", epochs=5, size=16, base=1)

    assert [val_loss for train_loss, val_loss in torch.load("unet.pt")["losses"]] == [3.0, 2.0]

def test_the_seed_decides_the_network():
    def train(seed):
        unet.train("toy", epochs=1, size=16, base=1, seed=seed)
        return torch.load("unet.pt")["model"]["final.weight"]

    assert torch.equal(train(seed=1), train(seed=1))
    assert not torch.equal(train(seed=1), train(seed=2))

# -------- using it --------
def test_five_epochs_are_enough_for_new_toys(trained):
    saved, net = unet.load(trained)

    loss, iou = unet.evaluate(net, toys(300))

    assert iou.min() > 0.6  # the border is the hardest class

def test_an_image_gets_the_same_logits_alone_and_in_a_batch(trained):
    """Red in training mode, where BatchNorm takes mean and variance of the whole batch."""
    saved, net = unet.load(trained)
    images, masks = batch(toys(8))

    assert torch.allclose(net(images)[:1], net(images[:1]), atol=1e-4)

def test_test_prints_the_scores_of_the_test_images(trained, monkeypatch, capsys):
    """A class that is nowhere, here the background, is nan and in no mean."""
    def evaluate(net, dataset):
        assert torch.equal(dataset[0][0], toys(1)[0][0])
        return 0.25, torch.tensor([0.5, math.nan, 1.0])

    monkeypatch.setattr(unet, "evaluate", evaluate)
    unet.test(checkpoint=trained)

    printed = capsys.readouterr().out
    assert "0.250" in printed
    assert "mIoU 0.750" in printed  # (1/2 + 1) / 2
    assert "Dice 0.833" in printed  # (2/3 + 1) / 2
    assert "pet 0.500" in printed
    assert "border 1.000" in printed

def grid(images):
    """Six images (6, 3, H, W) beside each other, as matplotlib takes them."""
    return unet.utils.make_grid(images, nrow=6).movedim(0, -1).numpy()

def test_show_draws_images_masks_predictions_and_losses(trained, monkeypatch):
    figure = unet.Figure(layout="constrained")
    monkeypatch.setattr(unet, "Figure", lambda **options: figure)

    unet.show(checkpoint=trained)

    saved, net = unet.load(trained)
    images, masks = batch([toys(300)[i] for i in range(0, 300, 50)])
    predictions = net(images).argmax(dim=1)
    drawn = [axis.images[0].get_array() for axis in figure.axes[:3]]
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[3].lines}
    assert [axis.get_title() for axis in figure.axes[:3]] == ["image", "ground truth", "prediction"]
    assert (drawn[0] == grid(images)).all()
    assert (drawn[1] == grid(unet.COLOURS[masks].movedim(-1, 1))).all()
    assert (drawn[2] == grid(unet.COLOURS[predictions].movedim(-1, 1))).all()
    assert list(zip(lines["train loss"], lines["val loss"])) == saved["losses"]

def test_predict_draws_the_classes_over_the_upright_photo(trained):
    """A turned camera notes it in EXIF. Logits are enlarged, as classes would have stairs."""
    photo, trimap = unet.open_pairs("toy", "test")[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned, so the photo must be turned clockwise
    photo.transpose(Image.Transpose.ROTATE_90).save("toy.png", exif=exif)

    unet.predict("toy.png", trained)

    images, masks = batch(toys(1))
    logits = F.interpolate(unet.load(trained)[1](images), photo.size[::-1], mode="bilinear")
    colours = Image.fromarray(unet.COLOURS[logits.argmax(dim=1)[0]].numpy())
    wanted = Image.blend(photo, colours, 0.5)
    assert Image.open("toy-overlay.png").tobytes() == wanted.tobytes()
