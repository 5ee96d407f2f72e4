"""Examples that explain unet.py, in its order. Run them with `python -m pytest`."""
import math, re
from inspect import getsource
from types import SimpleNamespace

import pytest, torch, unet
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.utils import make_grid

unet.DEVICE = torch.device("cpu")  # no test needs a GPU
torch.set_num_threads(1)
SEED = 0  # any other does as well
PET, BACKGROUND, BORDER = 0, 1, 2

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(SEED)

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The checkpoint of a small network that has learned 240 toys."""
    path = tmp_path_factory.mktemp("trained") / "toy.pt"
    unet.train("toy", path, epochs=5, size=32, base=8, lr=4e-3, seed=SEED)
    return path

def toys(count):
    """A dataset of so many toys, 32 pixels wide."""
    return unet.PetDataset(unet.open_pairs("toy", "test")[:count], 32)

def batch(dataset):  # all its images (N, 3, 32, 32) and masks (N, 32, 32)
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
    write_pet(tmp_path / "oxford-iiit-pet", "trainval", label=1)
    write_pet(tmp_path / "oxford-iiit-pet", "test", label=2)

    [(photo, trimap)] = unet.open_pairs(tmp_path, "trainval")
    [(test_photo, test_trimap)] = unet.open_pairs(tmp_path, "test")

    assert photo.mode == "RGB"
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
    assert image[:, 0].tolist() == [[1, 0], [0, 0], [0, 0]]  # the first row of each colour
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

    rows = {(*image[0, 0].tolist(), *mask[0].tolist()) for image, mask in samples}
    assert rows == {(1, 0, PET, BORDER), (0, 1, BORDER, PET)}

@pytest.mark.parametrize("label", [0, 4, 255])
def test_a_label_without_a_class_is_refused_with_its_file(label):
    Image.new("L", (2, 2), label).save("trimap.png")
    pair = Image.new("RGB", (2, 2)), Image.open("trimap.png")

    with pytest.raises(ValueError, match=f"trimap.png.*{label}"):
        unet.PetDataset([pair], 2)

# -------- model --------
def run_with_notes(net, images):
    """Run the network. Each of its parts notes what it was given and what it made."""
    def note(part, given, made):
        part.given, part.made = given[0], made

    for part in net.children():
        part.register_forward_hook(note)
    return net(images)

def test_every_shape_comment_of_forward_is_true():
    net = unet.UNet(base=64)
    run_with_notes(net, torch.zeros(1, 3, 128, 128))

    shapes = [net.enc1.given.shape]
    for name, part in net.named_children():  # in the order of forward
        if name.startswith("dec"):
            shapes.append(part.given.shape)
        if name != "pool":
            shapes.append(part.made.shape)
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
    run_with_notes(net, torch.randn(1, 3, 32, 32))

    for up, skip, dec in ((net.up4, net.enc4, net.dec4), (net.up3, net.enc3, net.dec3),
                          (net.up2, net.enc2, net.dec2), (net.up1, net.enc1, net.dec1)):
        assert torch.equal(dec.given, torch.cat((up.made, skip.made), dim=1))

@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_skip_passes_gradients_to_its_encoder(level):
    """Red if you cut or detach a skip. With zero weights in up, no other way is left."""
    net = unet.UNet(base=2)
    net.get_submodule(f"up{level}").weight.data.zero_()

    net(torch.randn(2, 3, 32, 32)).square().sum().backward()

    assert net.get_submodule(f"enc{level}")[0].weight.grad.abs().max() > 0

@pytest.mark.parametrize("level, width", [("enc1", 5), ("enc2", 14), ("bottleneck", 140)])
def test_how_far_a_level_sees(level, width):
    """A number depends on a pixel if its gradient there is not 0."""
    net, image = unet.UNet(base=4).eval(), torch.rand(1, 3, 256, 256, requires_grad=True)
    run_with_notes(net, image)
    made = net.get_submodule(level).made

    made[0, :, made.shape[2] // 2, made.shape[3] // 2].sum().backward()

    columns = image.grad[0].abs().sum(dim=(0, 1)).nonzero()
    assert columns.max() - columns.min() + 1 == width

def test_other_numbers_of_channels_and_classes():
    net = unet.UNet(in_channels=1, out_classes=5, base=2)

    assert net(torch.zeros(2, 1, 32, 48)).shape == (2, 5, 32, 48)

# -------- training --------
def test_cross_entropy_by_hand():
    """Two pixels. Their true classes, 0 and 1, have the probabilities 0.6 and 0.5."""
    probabilities = torch.tensor([[0.6, 0.3], [0.2, 0.5], [0.2, 0.2]])  # (classes, pixels)
    logits = probabilities.log().reshape(1, 3, 1, 2)  # (N, classes, H, W)
    masks = torch.tensor([[[0, 1]]])  # (N, H, W)

    loss = unet.loss_fn(logits, masks)

    assert loss.item() == pytest.approx((-math.log(0.6) - math.log(0.5)) / 2)

def constant_rate(optimizer):
    """A schedule that leaves the learning rate as it is."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)

def moved(steps):
    """How far so many steps of 0.1 move the weights of one layer."""
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 1)
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    loader = unet.DataLoader(steps * [toys(1)[0]])
    unet.train_epoch(net, loader, optimizer, constant_rate(optimizer))
    return net.weight.detach() - before

def test_gradients_do_not_pile_up(monkeypatch):
    """Red without zero_grad: the second step would add the gradients of the first. This loss
    has the same gradients everywhere, so two steps must go twice as far as one."""
    monkeypatch.setattr(unet, "loss_fn", lambda logits, masks: logits.mean())

    assert moved(steps=1).abs().min() > 0
    assert torch.allclose(moved(steps=2), 2 * moved(steps=1))

def test_an_epoch_steps_once_for_each_batch_and_returns_the_mean_loss_of_the_images():
    """With a learning rate of 0, this is what evaluate returns. The second batch is smaller."""
    net = nn.Conv2d(3, 3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0)
    schedule = constant_rate(optimizer)

    train_loss = unet.train_epoch(net, unet.DataLoader(toys(3), 2), optimizer, schedule)

    assert train_loss == pytest.approx(unet.evaluate(net, toys(3))[0])
    assert schedule.last_epoch == 2  # PyTorch's name for the number of steps

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
    """An image of one row and its mask. Colour c of the image is 1 where the prediction is c, so
    that nn.Identity is a network that predicts it."""
    image = F.one_hot(torch.tensor([prediction]), 3).movedim(-1, 0).float()  # (3, 1, W)
    return image, torch.tensor([mask])

def test_iou_by_hand():
    dataset = [row(prediction=[0, 1, 1, 0], mask=[1, 1, 0, 0])]

    loss, iou = unet.evaluate(nn.Identity(), dataset)

    assert iou[PET] == pytest.approx(1 / 3)  # both have pixel 4, one of them 1 and 3
    assert iou[BACKGROUND] == pytest.approx(1 / 3)  # pixel 2, and 1 and 3
    assert iou[BORDER].isnan()  # it is nowhere

def test_scores_are_over_all_pixels_and_not_over_batches():
    """Eight images fit into one batch of evaluate, and the ninth is alone in the next."""
    right, wrong = row([0, 1], [0, 1]), row([1, 0], [0, 1])

    loss, iou = unet.evaluate(nn.Identity(), 8 * [right] + [wrong])

    right_loss, _ = unet.evaluate(nn.Identity(), [right])
    wrong_loss, _ = unet.evaluate(nn.Identity(), [wrong])
    assert iou[PET] == pytest.approx(8 / 10)  # the wrong image adds two pixels to the union
    assert loss == pytest.approx((8 * right_loss + wrong_loss) / 9)

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
    """Runs train on ten grey images, 0, 10, ... 90. Returns what train_epoch and evaluate were
    given, which only pretend to work. The fourth epoch is interrupted."""
    def run(**options):
        seen = SimpleNamespace(epochs=0)
        pairs = [(Image.new("RGB", (4, 4), (k, k, k)), Image.new("L", (4, 4), 1))
                 for k in range(0, 100, 10)]

        def train_epoch(*given):
            seen.net, seen.loader, seen.optimizer, seen.schedule = given
            seen.epochs += 1
            if seen.epochs == 4:
                raise KeyboardInterrupt
            return float(seen.epochs)

        def evaluate(net, dataset):
            seen.val_set = dataset
            return 0.5, torch.ones(3)

        monkeypatch.setattr(unet, "open_pairs", lambda data, split: {"trainval": pairs}[split])
        monkeypatch.setattr(unet, "train_epoch", train_epoch)
        monkeypatch.setattr(unet, "evaluate", evaluate)
        unet.train(size=16, base=1, **options)
        return seen
    return run

def greys(dataset):
    return [round(image[0, 0, 0].item() * 255) for image, mask in dataset]

def test_validation_images_are_never_trained_on(dry_run):
    seen = dry_run(epochs=1)

    assert not set(greys(seen.loader.dataset)) & set(greys(seen.val_set))

def test_the_split_is_random_as_the_pairs_are_sorted_by_breed(dry_run):
    validated = sorted(greys(dry_run(epochs=1).val_set))

    assert validated not in ([0, 10], [80, 90])

def test_every_seed_has_its_own_weights_but_the_same_validation_images(dry_run):
    one, two = dry_run(epochs=1, seed=1), dry_run(epochs=1, seed=2)

    assert not torch.equal(one.net.final.weight, two.net.final.weight)
    assert greys(one.val_set) == greys(two.val_set)

def test_only_training_images_are_mirrored(dry_run):
    seen = dry_run(epochs=1)

    assert seen.loader.dataset.mirror
    assert not seen.val_set.mirror

def test_training_images_come_in_another_order_each_epoch(dry_run):
    loader = dry_run(epochs=1, batch_size=8).loader

    (first, _), (second, _) = next(iter(loader)), next(iter(loader))

    assert not torch.equal(first, second)

def test_the_learning_rate_rises_to_lr_and_falls_almost_to_0(dry_run):
    seen = dry_run(epochs=3, batch_size=1, lr=0.02)

    rates = []
    for _ in range(3 * len(seen.loader)):
        rates.append(seen.optimizer.param_groups[0]["lr"])
        seen.optimizer.step()
        seen.schedule.step()

    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(0.02, rel=0.1)
    assert max(rates[0], rates[-1]) < 0.002

def test_an_interrupted_run_keeps_its_finished_epochs(dry_run):
    with pytest.raises(KeyboardInterrupt):
        dry_run(epochs=5)

    losses = torch.load("unet.pt")["losses"]
    assert losses == [(1.0, 0.5), (2.0, 0.5), (3.0, 0.5)]  # training and validation

def test_the_same_seed_gives_the_same_network():
    for checkpoint in ("a.pt", "b.pt"):
        unet.train("toy", checkpoint, epochs=1, size=16, base=1, seed=3)

    a, b = torch.load("a.pt")["model"], torch.load("b.pt")["model"]
    assert all(torch.equal(a[name], b[name]) for name in a)

# -------- using it --------
def test_training_works(trained):
    saved, net = unet.load(trained)

    loss, iou = unet.evaluate(net, toys(300))

    assert iou.min() > 0.6  # of the border

def test_an_image_gets_the_same_logits_alone_and_in_a_batch(trained):
    """Red in training mode, where BatchNorm takes mean and variance of the whole batch."""
    saved, net = unet.load(trained)
    images, masks = batch(toys(8))

    assert torch.allclose(net(images)[:1], net(images[:1]), atol=1e-4)

def test_test_prints_the_scores_of_the_test_images(trained, monkeypatch, capsys):
    """The background is neither in a mask nor in a prediction here. It is in no mean."""
    def evaluate(net, dataset):
        assert len(dataset) == 300
        assert torch.equal(dataset[0][0], toys(1)[0][0])
        return 0.25, torch.tensor([0.5, math.nan, 1.0])

    monkeypatch.setattr(unet, "evaluate", evaluate)
    unet.test(checkpoint=trained)

    printed = capsys.readouterr().out
    assert "loss 0.250" in printed
    assert "mIoU 0.750" in printed  # (1/2 + 1) / 2
    assert "Dice 0.833" in printed  # (2/3 + 1) / 2
    assert "pet 0.500" in printed and "border 1.000" in printed

def grid(images):
    """Six images (6, 3, H, W) beside each other, as matplotlib takes them."""
    return make_grid(images, nrow=6).movedim(0, -1).numpy()

def test_show_draws_images_masks_predictions_and_losses(trained, monkeypatch):
    figure = unet.Figure(layout="constrained")
    monkeypatch.setattr(unet, "Figure", lambda **options: figure)

    unet.show(checkpoint=trained)

    saved, net = unet.load(trained)
    images, masks = batch([toys(300)[i] for i in range(0, 300, 50)])
    predictions = net(images).argmax(dim=1)
    drawn = [axis.images[0].get_array() for axis in figure.axes[:3]]
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[3].lines}
    assert (drawn[0] == grid(images)).all()
    assert (drawn[1] == grid(unet.COLOURS[masks].movedim(-1, 1))).all()
    assert (drawn[2] == grid(unet.COLOURS[predictions].movedim(-1, 1))).all()
    assert list(zip(lines["train loss"], lines["val loss"])) == saved["losses"]

def test_predict_turns_the_photo_upright_and_keeps_its_size(trained):
    photo, exif = Image.new("RGB", (50, 40)), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: height and width change places
    photo.save("cat.jpg", exif=exif)

    unet.predict("cat.jpg", trained)

    assert Image.open("cat-overlay.png").size == (40, 50)

def test_predict_enlarges_logits_and_not_classes(trained):
    """Enlarged classes would have stairs at their edges."""
    photo, trimap = unet.open_pairs("toy", "test")[0]
    photo.save("toy.png")

    unet.predict("toy.png", trained)

    images, masks = batch(toys(1))
    logits = F.interpolate(unet.load(trained)[1](images), photo.size[::-1], mode="bilinear")
    colours = Image.fromarray(unet.COLOURS[logits.argmax(dim=1)[0]].numpy())
    wanted = Image.blend(photo, colours, 0.5)
    assert Image.open("toy-overlay.png").tobytes() == wanted.tobytes()
