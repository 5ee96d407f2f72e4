"""Image segmentation by a U-Net: is a pixel pet, background, or their border?

    image  (3, 128, 128)                                  logits  (3, 128, 128)
    enc1  (64, 128, 128) ------------ skip ------------> dec1  (64, 128, 128)
       enc2  (128, 64, 64) ----------- skip ---------> dec2  (128, 64, 64)
          enc3  (256, 32, 32) -------- skip ------> dec3  (256, 32, 32)
             enc4  (512, 16, 16) ----- skip ---> dec4  (512, 16, 16)
                         bottleneck  (1024, 8, 8)

Shapes are (channels, height, width): 3 colours for the image, 3 classes for the logits.
Logits are any numbers. Softmax turns them into probabilities, argmax into a class.

The network is named after this U. On the left, the encoder halves height and width, so
that each position sees more of the image, and doubles the channels to describe it. It
finds what is there but loses where. The bottleneck is the coarsest level. On the right,
the decoder doubles height and width again. Skip connections give it what the encoder
computed before each halving, so that edges find their places.

`python unet.py train --epochs 5` downloads the Oxford-IIIT Pet Dataset and trains. Then
`test` prints scores, `show` draws predictions, and `predict cat.jpg` takes any photo.
The paper (Ronneberger et al. 2015, arXiv 1505.04597) has no padding, no BatchNorm."""
import argparse, math, random, sys
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision import datasets, utils
from torchvision.transforms.functional import pil_to_tensor

# -------- data --------
# A trimap is an image of labels: 1 is pet, 2 is background, and 3 is border.
# A mask holds labels minus 1, as classes count from 0. These colours draw it.
CLASSES = {"pet": (230, 159, 0), "background": (0, 90, 150), "border": (240, 240, 240)}
COLOURS = torch.tensor(list(CLASSES.values()), dtype=torch.uint8)  # (classes, 3)

def open_pairs(data, split):
    """The pairs (RGB image, trimap), as PIL images, of split "trainval" or "test"."""
    if data == "toy":
        return [draw_pair(f"{split} {i}") for i in range(300)]
    if split == "test" and not Path(data, "oxford-iiit-pet/annotations").exists():
        raise FileNotFoundError(f"no dataset in {data}: `train` downloads it")
    return datasets.OxfordIIITPet(data, split, "segmentation", download=True)

class PetDataset(Dataset):
    """Images, uint8 (3, size, size), and masks, int64 (size, size). It stores both as
    bytes, 64 KiB a pair at size 128, since floats would take four times as much."""
    def __init__(self, pairs, size, mirror=False):
        self.mirror = mirror
        self.samples = []
        for i in range(len(pairs)):  # `in pairs` would hide an IndexError
            image, trimap = pairs[i]
            image = pil_to_tensor(image.resize((size, size), Image.BILINEAR))
            # NEAREST copies. A mean of pet (1) and border (3) would be background.
            labels = pil_to_tensor(trimap.resize((size, size), Image.NEAREST))[0].long()
            if labels.min() < 1 or labels.max() > len(CLASSES):
                file, found = getattr(trimap, "filename", i), labels.unique().tolist()
                raise ValueError(f"{file}: labels {found}, not 1 to {len(CLASSES)}")
            self.samples.append((image, (labels - 1).byte()))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        image, mask = self.samples[i]
        if self.mirror and torch.rand(1) < 0.5:
            # What moves an image must move its mask.
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask.long()  # the loss expects int64

# -------- model: for N images in a batch, of height H and width W --------
def conv_block(in_ch, out_ch):
    """(N, in_ch, H, W) to (N, out_ch, H, W). In training, BatchNorm gives each channel
    mean 0 and variance 1 over all pixels of the batch, then a learned scale and shift.
    Subtracting the mean would cancel a convolution's bias, so there is none."""
    return nn.Sequential(
        nn.Conv2d(in_ch, out_ch, 3, padding=1, bias=False),  # padding keeps H and W
        nn.BatchNorm2d(out_ch),
        nn.ReLU(),
        nn.Conv2d(out_ch, out_ch, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_ch),
        nn.ReLU())

class UNet(nn.Module):
    """Images (N, in_channels, H, W) to logits (N, out_classes, H, W). H and W must be
    multiples of 16, so that after four halvings the doubled sizes fit the skips."""
    def __init__(self, in_channels=3, out_classes=len(CLASSES), base=64):
        super().__init__()
        c1, c2, c3, c4, c5 = base, 2 * base, 4 * base, 8 * base, 16 * base
        self.enc1 = conv_block(in_channels, c1)
        self.enc2 = conv_block(c1, c2)
        self.enc3 = conv_block(c2, c3)
        self.enc4 = conv_block(c3, c4)
        self.pool = nn.MaxPool2d(2)  # the largest of 2x2
        self.bottleneck = conv_block(c4, c5)

        # Each transposed convolution makes 2x2 pixels of one, with learned weights.
        self.up4 = nn.ConvTranspose2d(c5, c4, 2, stride=2)
        self.dec4 = conv_block(c4 + c4, c4)  # up4 and enc4
        self.up3 = nn.ConvTranspose2d(c4, c3, 2, stride=2)
        self.dec3 = conv_block(c3 + c3, c3)
        self.up2 = nn.ConvTranspose2d(c3, c2, 2, stride=2)
        self.dec2 = conv_block(c2 + c2, c2)
        self.up1 = nn.ConvTranspose2d(c2, c1, 2, stride=2)
        self.dec1 = conv_block(c1 + c1, c1)
        self.final = nn.Conv2d(c1, out_classes, 1)  # the same classifier at each pixel

    def forward(self, x):                   # (N,    3, 128, 128)  for base=64, size=128
        e1 = self.enc1(x)                   # (N,   64, 128, 128)
        e2 = self.enc2(self.pool(e1))       # (N,  128,  64,  64)
        e3 = self.enc3(self.pool(e2))       # (N,  256,  32,  32)
        e4 = self.enc4(self.pool(e3))       # (N,  512,  16,  16)
        b = self.bottleneck(self.pool(e4))  # (N, 1024,   8,   8)

        # A level doubles H and W and puts the skip's channels beside its own (dim 1).
        # A sum would mix both before dec4 weighs them. To cut this skip, write 0 * e4.
        d4 = self.up4(b)                    # (N,  512,  16,  16)
        d4 = torch.cat((d4, e4), dim=1)     # (N, 1024,  16,  16)
        d4 = self.dec4(d4)                  # (N,  512,  16,  16)

        d3 = self.up3(d4)                   # (N,  256,  32,  32)
        d3 = torch.cat((d3, e3), dim=1)     # (N,  512,  32,  32)
        d3 = self.dec3(d3)                  # (N,  256,  32,  32)

        d2 = self.up2(d3)                   # (N,  128,  64,  64)
        d2 = torch.cat((d2, e2), dim=1)     # (N,  256,  64,  64)
        d2 = self.dec2(d2)                  # (N,  128,  64,  64)

        d1 = self.up1(d2)                   # (N,   64, 128, 128)
        d1 = torch.cat((d1, e1), dim=1)     # (N,  128, 128, 128)
        d1 = self.dec1(d1)                  # (N,   64, 128, 128)
        return self.final(d1)               # (N,    3, 128, 128)

# -------- device --------
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

# Mixed precision: weights stay float32, but autocast computes convolutions in bfloat16,
# which has float32's range but fewer digits, and is fast on some hardware.
BF16 = DEVICE.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
if DEVICE.type == "cpu":
    BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)

def compute_logits(net, images):
    """uint8 images (N, 3, H, W) to float32 logits (N, classes, H, W), on DEVICE."""
    x = images.to(DEVICE).float() / 255
    if BF16:  # faster with a pixel's channels side by side in memory
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16):
        return net(x).float()

# -------- loss and scores --------
# The loss takes logits (N, classes, H, W) and masks (N, H, W), which need no channels,
# as they hold the number of the class. It is the mean over all pixels of the batch of
# -log(p), where p is the probability that softmax gives the true class.
loss_fn = nn.CrossEntropyLoss()

@torch.no_grad()
def evaluate(net, dataset):
    """The mean loss and the overlap of predictions and masks, over all pixels.

    With mask 1 1 0 0 and prediction 0 1 1 0, class 1 has IoU intersection / union = 1/3
    and Dice 2 * intersection / (sum of both areas) = 2/4. mIoU and Dice are means over
    the classes, without those that occur nowhere (nan)."""
    net.eval()  # BatchNorm uses the mean and variance averaged in training
    total_loss = 0
    intersection, union = torch.zeros(2, len(CLASSES), dtype=torch.int64, device=DEVICE)

    for images, masks in DataLoader(dataset, batch_size=8):
        logits, masks = compute_logits(net, images), masks.to(DEVICE)
        total_loss += loss_fn(logits, masks).item() * len(images)
        predictions = logits.argmax(dim=1)  # (N, H, W)
        for c in range(len(CLASSES)):
            intersection[c] += ((predictions == c) & (masks == c)).sum()
            union[c] += ((predictions == c) | (masks == c)).sum()

    iou = intersection / union
    dice = 2 * iou / (1 + iou)  # the areas add up to union + intersection
    class_iou = {f"IoU {name}": value for name, value in zip(CLASSES, iou.tolist())}
    return {"loss": total_loss / len(dataset), "mIoU": iou.nanmean().item(),
            "Dice": dice.nanmean().item(), **class_iou}

# -------- training --------
def train_epoch(net, loader, optimizer, schedule):
    """Train on each image once. Return the mean loss of the steps. It can be above the
    validation loss, as the weights improve on the way."""
    net.train()  # BatchNorm uses the mean and variance of the batch
    total_loss = 0
    for step, (images, masks) in enumerate(loader, 1):
        logits = compute_logits(net, images)      # (N, classes, H, W)
        loss = loss_fn(logits, masks.to(DEVICE))  # masks are (N, H, W)

        optimizer.zero_grad()  # clear the old gradients
        loss.backward()  # compute the gradients: how the loss changes with each weight
        optimizer.step()  # move each weight a little against its recent gradients
        schedule.step()  # set the learning rate, the size of the next move

        total_loss += loss.item()
        print(f"step {step} of {len(loader)}, loss {loss:.3f}", end="\r", file=sys.stderr)
    return total_loss / len(loader)

def save(checkpoint, net, **facts):
    torch.save({"model": net.state_dict(), **facts}, f"{checkpoint}.tmp")
    Path(f"{checkpoint}.tmp").replace(checkpoint)  # a crash keeps the old file

def load(checkpoint):
    """What `save` wrote, as a dict, and its network."""
    if not Path(checkpoint).exists():
        raise FileNotFoundError(f"no {checkpoint}: run `train` first")
    saved = torch.load(checkpoint, map_location="cpu")
    net = UNet(base=saved["base"]).to(DEVICE)
    net.load_state_dict(saved["model"])
    return saved, net.eval().requires_grad_(False)

def train(data="data", checkpoint="unet.pt", epochs=5, batch_size=8, size=128, base=64,
          lr=1e-3, seed=0):
    """Train a network and save it after each epoch."""
    if size % 16:
        raise ValueError(f"size must be a multiple of 16, not {size}")
    pairs = open_pairs(data, "trainval")
    if len(pairs) < 5:
        raise ValueError(f"{data} has {len(pairs)} images for training, but needs 5")

    # The list is sorted by breed, so it is shuffled, the same way for every seed.
    generator = torch.Generator().manual_seed(0)
    train_pairs, val_pairs = random_split(pairs, (0.8, 0.2), generator)
    print(f"{len(train_pairs)} training, {len(val_pairs)} validation images, {DEVICE}")
    train_set = PetDataset(train_pairs, size, mirror=True)
    val_set = PetDataset(val_pairs, size)
    Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed)  # for initial weights, image order and mirroring
    loader = DataLoader(train_set, batch_size, shuffle=True)
    net = UNet(base=base).to(DEVICE)
    # With these betas AdamW averages fewer gradients. cycle_momentum would replace 0.5.
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.5, 0.99))
    # The learning rate rises to lr, as large steps would upset untrained weights. Then
    # it falls to almost 0, so that the weights settle.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * len(loader), anneal_strategy="linear", cycle_momentum=False)

    history = []
    for epoch in range(1, epochs + 1):
        train_loss = train_epoch(net, loader, optimizer, schedule)
        scores = evaluate(net, val_set)
        if not math.isfinite(train_loss + scores["loss"]):
            raise ValueError(f"the loss is not finite: try an lr below {lr}")
        row = {"train loss": train_loss, "val loss": scores["loss"], "mIoU": scores["mIoU"]}
        print(f"epoch {epoch}", *[f" {name} {row[name]:.3f}" for name in row], flush=True)
        history.append(row)
        save(checkpoint, net, data=str(data), size=size, base=base, history=history)

# -------- using it --------
def test(data=None, checkpoint="unet.pt"):
    """Print the scores on the test images."""
    saved, net = load(checkpoint)
    data = data or saved["data"]
    pairs = open_pairs(data, "test")
    print(f"{len(pairs)} test images of {data}, {DEVICE}")
    scores = evaluate(net, PetDataset(pairs, saved["size"]))
    print(*[f"{name} {scores[name]:.3f} " for name in scores])

def show(data=None, checkpoint="unet.pt"):
    """Draw images, masks, predictions and curves: unet.pt gives unet.png."""
    saved, net = load(checkpoint)
    pairs = open_pairs(data or saved["data"], "test")
    every = math.ceil(len(pairs) / 6)  # at most six
    test_set = PetDataset([pairs[i] for i in range(0, len(pairs), every)], saved["size"])
    images, masks = next(iter(DataLoader(test_set, 6)))
    predictions = compute_logits(net, images).argmax(dim=1).cpu()

    colours = COLOURS[torch.cat((masks, predictions))].movedim(-1, 1)  # (2N, 3, H, W)
    grid = utils.make_grid(torch.cat((images, colours)), nrow=len(images))
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    top, curves = figure.subplots(2, height_ratios=(3, 1))
    top.imshow(grid.movedim(0, -1).numpy())  # to (H, W, 3)
    top.set(xticks=[], yticks=[], title="rows: input, ground truth, prediction")

    for name, colour in zip(CLASSES, COLOURS.numpy() / 255):  # for the legend alone
        curves.plot([], "s", color=colour, markeredgecolor="gray", label=name)
    epochs = range(1, len(saved["history"]) + 1)
    for name in saved["history"][0]:
        curves.plot(epochs, [row[name] for row in saved["history"]], ".-", label=name)
    curves.set_xlabel("epoch")
    curves.locator_params(axis="x", integer=True, min_n_ticks=1)

    figure.legend(loc="outside lower center", ncols=6)
    picture = Path(checkpoint).with_suffix(".png")
    figure.savefig(picture)
    print(f"wrote {picture}")

def predict(photo, checkpoint="unet.pt"):
    """Draw the classes over any photo: cat.jpg gives cat-overlay.png, here."""
    saved, net = load(checkpoint)
    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")  # upright
    square = pil_to_tensor(image.resize((saved["size"], saved["size"]), Image.BILINEAR))
    logits = compute_logits(net, square[None])
    # Enlarge logits, since enlarged classes would have stairs as edges.
    logits = nn.functional.interpolate(logits, image.size[::-1], mode="bilinear")
    colours = Image.fromarray(COLOURS[logits.argmax(dim=1)[0].cpu()].numpy())
    picture = f"{Path(photo).stem}-overlay.png"
    Image.blend(image, colours, 0.5).save(picture)
    print(f"wrote {picture}")

# -------- the lesson ends here: toy data and the command line --------
def draw_pair(name):
    """A light polygon on a dark ground, and its trimap."""
    rng = random.Random(name)
    x, y, corners = rng.randint(60, 132), rng.randint(60, 100), rng.randint(3, 8)
    image = Image.new("RGB", (192, 160), f"hsl({rng.randrange(360)}, 50%, 30%)")
    light = f"hsl({rng.randrange(360)}, 50%, 70%)"
    ImageDraw.Draw(image).regular_polygon((x, y, 50), corners, fill=light)
    trimap = Image.new("L", (192, 160), 2)
    ImageDraw.Draw(trimap).regular_polygon((x, y, 50), corners, fill=1, outline=3, width=6)
    return image, trimap

def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for run in (train, test, show, predict):
        command = commands.add_parser(
            run.__name__, help=run.__doc__, argument_default=argparse.SUPPRESS)
        command.set_defaults(run=run)
        add = command.add_argument
        add("--checkpoint", help="file of the network (default: unet.pt)")
        if run == predict:
            add("photo")
        else:
            add("--data", help="folder, or toy (default: data, or as trained)")
        if run == train:
            add("--epochs", type=int, help="passes over the images (default: 5)")
            add("--batch-size", type=int, help="images in a step (default: 8)")
            add("--size", type=int, help="height and width (default: 128)")
            add("--base", type=int, help="channels of enc1 (default: 64)")
            add("--lr", type=float, help="highest learning rate (default: 0.001)")
            add("--seed", type=int, help="seed of random numbers (default: 0)")

    options = vars(parser.parse_args())
    run = options.pop("run")
    try:
        run(**options)
    except URLError as error:
        sys.exit(f"{error}: try --data toy, or download by hand (README.md)")
    except (KeyboardInterrupt, OSError, Image.DecompressionBombError) as error:
        sys.exit(f"\nstopped. {error}")

if __name__ == "__main__":
    main()
