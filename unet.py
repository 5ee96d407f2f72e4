"""A U-Net that labels each pixel of a photo as pet, background, or their border.

    image  (3, 128, 128)                                  logits  (3, 128, 128)
    enc1  (64, 128, 128) ------------ skip ------------> dec1  (64, 128, 128)
       enc2  (128, 64, 64) ----------- skip ---------> dec2  (128, 64, 64)
          enc3  (256, 32, 32) -------- skip ------> dec3  (256, 32, 32)
             enc4  (512, 16, 16) ----- skip ---> dec4  (512, 16, 16)
                         bottleneck  (1024, 8, 8)

Shapes are (channels, height, width). On the left side of the U, the encoder halves height
and width four times. Each halving brings distant pixels closer, so convolutions reach
further: a number in enc1 depends on 5x5 pixels of the image, in enc2 on 14x14, and in the
bottleneck on 140x140, clipped to the image. The channels double each time. So in the
bottleneck, 1024 channels say what is in the image, but only 8x8 positions say where.

On the right side, the decoder doubles height and width four times, so that every pixel
gets a class. This alone would leave edges blurred. So at each size, a skip connection
appends the encoder's channels of that size, in which edges are sharper.

Each pixel gets three numbers called logits, one for each class. Softmax turns them into
probabilities. The class with the largest logit is the prediction.

    python unet.py train --data toy --base 16  train on polygons, without a download
    python unet.py train --epochs 5            download the Oxford-IIIT Pets (0.8 GB), train
    python unet.py test                        print scores on images not used in training
    python unet.py show                        draw images, masks and predictions
    python unet.py predict cat.jpg             draw the prediction over a photo"""
import argparse, inspect, random, sys
from pathlib import Path

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision import datasets, utils
from torchvision.transforms.functional import pil_to_tensor

# -------- data --------
# In a trimap, pet is 1, background 2, border or unclear 3. In a mask, they are 0, 1, 2.
CLASSES = {"pet": (230, 159, 0), "background": (0, 90, 150), "border": (240, 240, 240)}
COLOURS = torch.tensor(list(CLASSES.values()), dtype=torch.uint8)  # RGB, to draw masks

def open_pairs(data, split):
    """The (image, trimap) pairs of the split "trainval" or "test", as PIL images."""
    if data == "toy":
        return [draw_toy(f"{split} {i}") for i in range(300)]
    return datasets.OxfordIIITPet(data, split, "segmentation", download=True)

class PetDataset(Dataset):
    """Images (3, size, size), float32 from 0 to 1, and their masks (size, size), int64."""
    def __init__(self, pairs, size, mirror=False):
        self.mirror = mirror
        self.samples = []  # resized, as bytes: floats take four times the memory

        for i in range(len(pairs)):  # a plain loop would hide an IndexError
            image, trimap = pairs[i]
            image = pil_to_tensor(image.resize((size, size), Image.BILINEAR))
            # NEAREST copies labels. The mean of pet (1) and border (3) would be background.
            labels = pil_to_tensor(trimap.resize((size, size), Image.NEAREST))[0]
            if labels.min() < 1 or labels.max() > len(CLASSES):
                file = getattr(trimap, "filename", f"trimap {i}")
                raise ValueError(f"{file} has labels {labels.unique().tolist()}")
            self.samples.append((image, labels - 1))
            print(f"image {i + 1}/{len(pairs)}", end="    \r", file=sys.stderr)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        image, mask = self.samples[i]
        # Augmentation: a mirrored image is one more example, if its mask is mirrored too.
        if self.mirror and torch.rand(1) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return image / 255, mask.long()  # the loss needs int64

# -------- model: shapes are (N, channels, H, W) for a batch of N images --------
def conv_block(in_ch, out_ch):
    """Two 3x3 convolutions: (N, in_ch, H, W) to (N, out_ch, H, W).

    Each output channel looks for one pattern, such as an edge. It has weights of its own,
    3x3 for each input channel, and applies them at every position. In training, BatchNorm
    gives it mean 0, which cancels any bias, and variance 1 over all pixels of the batch.
    Then it scales and shifts the channel by learned numbers. This makes training easier."""
    return nn.Sequential(
        nn.Conv2d(in_ch, out_ch, 3, padding=1, bias=False),  # padding keeps H and W
        nn.BatchNorm2d(out_ch),
        nn.ReLU(),  # max(x, 0): without it, a block could only form weighted sums
        nn.Conv2d(out_ch, out_ch, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_ch),
        nn.ReLU())

class UNet(nn.Module):
    """Images (N, in_channels, H, W) to logits (N, out_classes, H, W).

    H and W must be multiples of 16, or doubled sizes would not fit the skips. The
    paper (Ronneberger et al. 2015, arXiv 1505.04597) has no padding and no BatchNorm."""

    def __init__(self, in_channels=3, out_classes=len(CLASSES), base=64):
        super().__init__()
        c1, c2, c3, c4, c5 = base, 2 * base, 4 * base, 8 * base, 16 * base

        self.enc1 = conv_block(in_channels, c1)
        self.enc2 = conv_block(c1, c2)
        self.enc3 = conv_block(c2, c3)
        self.enc4 = conv_block(c3, c4)
        self.pool = nn.MaxPool2d(2)  # the largest of 2x2 numbers, to halve H and W
        self.bottleneck = conv_block(c4, c5)

        # Here, a transposed convolution turns each pixel into 2x2 pixels: weighted sums of
        # its channels. It halves the channels, and the skip appends as many.
        self.up4 = nn.ConvTranspose2d(c5, c4, 2, stride=2)
        self.dec4 = conv_block(c4 + c4, c4)
        self.up3 = nn.ConvTranspose2d(c4, c3, 2, stride=2)
        self.dec3 = conv_block(c3 + c3, c3)
        self.up2 = nn.ConvTranspose2d(c3, c2, 2, stride=2)
        self.dec2 = conv_block(c2 + c2, c2)
        self.up1 = nn.ConvTranspose2d(c2, c1, 2, stride=2)
        self.dec1 = conv_block(c1 + c1, c1)
        self.final = nn.Conv2d(c1, out_classes, 1)  # 1x1: the same classifier at each pixel

    def forward(self, x):                   # (N,    3, 128, 128)  for base=64, size=128
        e1 = self.enc1(x)                   # (N,   64, 128, 128)
        e2 = self.enc2(self.pool(e1))       # (N,  128,  64,  64)
        e3 = self.enc3(self.pool(e2))       # (N,  256,  32,  32)
        e4 = self.enc4(self.pool(e3))       # (N,  512,  16,  16)
        b = self.bottleneck(self.pool(e4))  # (N, 1024,   8,   8)

        # To see what the skips are worth, train with 0 * e4, 0 * e3, 0 * e2, 0 * e1 below.
        u4 = self.up4(b)                    # (N,  512,  16,  16)
        x4 = torch.cat((u4, e4), dim=1)     # (N, 1024,  16,  16)
        d4 = self.dec4(x4)                  # (N,  512,  16,  16)

        u3 = self.up3(d4)                   # (N,  256,  32,  32)
        x3 = torch.cat((u3, e3), dim=1)     # (N,  512,  32,  32)
        d3 = self.dec3(x3)                  # (N,  256,  32,  32)

        u2 = self.up2(d3)                   # (N,  128,  64,  64)
        x2 = torch.cat((u2, e2), dim=1)     # (N,  256,  64,  64)
        d2 = self.dec2(x2)                  # (N,  128,  64,  64)

        u1 = self.up1(d2)                   # (N,   64, 128, 128)
        x1 = torch.cat((u1, e1), dim=1)     # (N,  128, 128, 128)
        d1 = self.dec1(x1)                  # (N,   64, 128, 128)
        return self.final(d1)               # (N,    3, 128, 128)

# -------- training --------
# A GPU if there is one, else the CPU. Mixed precision: where CUDA or the CPU is fast at
# bfloat16, convolutions use this 16-bit format, while the weights stay float32.
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
BF16 = torch.cuda.is_bf16_supported(including_emulation=False)
if DEVICE.type == "cpu":
    BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)

# The loss takes logits (N, classes, H, W) and masks (N, H, W). It applies softmax itself,
# and is the mean of -log(probability of the true class) over all pixels of the batch.
loss_fn = nn.CrossEntropyLoss()

def train_epoch(net, loader, optimizer, schedule):
    """Train once on each image. Return the mean loss, measured as the weights change."""
    net.train()  # BatchNorm uses the mean and variance of the batch
    total_loss = 0

    for step, (images, masks) in enumerate(loader, 1):
        images, masks = images.to(DEVICE), masks.to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16):
            logits = net(images)  # (N, classes, H, W)
            loss = loss_fn(logits, masks)

        optimizer.zero_grad()  # clear the gradients of the previous step
        loss.backward()        # compute gradients: how the loss changes with each weight
        optimizer.step()       # move each weight a little against its gradient
        schedule.step()        # set the learning rate: how far the next step moves

        total_loss += loss.item() * len(images)
        print(f"step {step}/{len(loader)}", end="    \r", file=sys.stderr)
    return total_loss / len(loader.dataset)

@torch.no_grad()
def evaluate(net, dataset):
    """Return the mean loss and the IoU of each class over all pixels of the dataset.

    IoU is intersection over union: how many pixels have the class in both prediction and
    mask, divided by how many have it in at least one. For prediction 0 1 1 1 and mask
    0 0 1 1, class 1 has 2/3, and class 2 has 0/0 = nan. mIoU is the mean without nan."""
    net.eval()  # BatchNorm uses its running averages of mean and variance
    total_loss = 0
    intersection, union = torch.zeros(2, len(CLASSES), dtype=torch.int64, device=DEVICE)

    for images, masks in DataLoader(dataset, batch_size=8):
        images, masks = images.to(DEVICE), masks.to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16):
            logits = net(images)
            total_loss += loss_fn(logits, masks).item() * len(images)

        predictions = logits.argmax(dim=1)  # (N, H, W)
        for c in range(len(CLASSES)):
            intersection[c] += ((predictions == c) & (masks == c)).sum()
            union[c] += ((predictions == c) | (masks == c)).sum()

    return total_loss / len(dataset), intersection / union

def train(data="data", checkpoint="unet.pt", epochs=5, batch_size=8, size=128, base=64,
          lr=5e-4, seed=0):
    """Train a network and save it after each epoch.

    data: a folder, or toy. epochs: passes over the images. batch_size: images per step.
    size: height and width in pixels. base: channels of enc1. lr: highest learning rate."""
    if size % 16:
        sys.exit(f"size must be a multiple of 16, not {size}")
    Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)

    # The network never trains on the validation images. If their loss rises while the
    # training loss falls, the network memorizes the training images: it overfits. Pairs are
    # sorted by breed, and a slice would have new breeds, so the split is random, but fixed.
    pairs = open_pairs(data, "trainval")
    generator = torch.Generator().manual_seed(0)
    train_pairs, val_pairs = random_split(pairs, (0.8, 0.2), generator)
    train_set = PetDataset(train_pairs, size, mirror=True)
    val_set = PetDataset(val_pairs, size)
    print(f"{len(train_set)} training, {len(val_set)} validation images, {DEVICE}")

    torch.manual_seed(seed)
    loader = DataLoader(train_set, batch_size, shuffle=True)
    net = UNet(base=base).to(DEVICE)

    # RMSprop divides each gradient by its recent size, so all weights move by similar
    # amounts. The learning rate rises slowly to `lr`, as large first steps can make the
    # loss diverge. Then it falls to almost 0, so that the weights settle.
    optimizer = torch.optim.RMSprop(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * len(loader), anneal_strategy="linear", cycle_momentum=False)

    losses = []
    for epoch in range(1, epochs + 1):
        train_loss = train_epoch(net, loader, optimizer, schedule)
        val_loss, iou = evaluate(net, val_set)
        print(f"epoch {epoch}  train loss {train_loss:.3f}  val loss {val_loss:.3f}"
              f"  mIoU {iou.nanmean():.3f}", flush=True)

        losses.append((train_loss, val_loss))
        torch.save({"model": net.state_dict(), "base": base, "size": size,
                    "data": str(data), "losses": losses}, f"{checkpoint}.tmp")
        Path(f"{checkpoint}.tmp").replace(checkpoint)  # a crash keeps the old file

# -------- using it --------
def load(checkpoint):
    """The dict that `train` saved, and its network."""
    saved = torch.load(checkpoint, map_location="cpu")
    net = UNet(base=saved["base"]).to(DEVICE)
    net.load_state_dict(saved["model"])
    return saved, net.eval()

def test(data="", checkpoint="unet.pt"):
    """Print the scores on the test images of `data`, by default the one trained on."""
    saved, net = load(checkpoint)
    data = data or saved["data"]
    dataset = PetDataset(open_pairs(data, "test"), saved["size"])
    print(f"{len(dataset)} test images of {data}")
    loss, iou = evaluate(net, dataset)
    dice = 2 * iou / (1 + iou)  # = 2 * intersection / (predicted + true pixels)

    print(f"loss {loss:.3f}  mIoU {iou.nanmean():.3f}  Dice {dice.nanmean():.3f}")
    print("  ".join(f"IoU {name} {value:.3f}" for name, value in zip(CLASSES, iou)))

@torch.no_grad()
def show(data="", checkpoint="unet.pt"):
    """Draw six test images, masks, predictions, and the losses: unet.pt gives unet.png."""
    saved, net = load(checkpoint)
    pairs = open_pairs(data or saved["data"], "test")
    six = PetDataset([pairs[i * len(pairs) // 6] for i in range(6)], saved["size"])
    images, masks = next(iter(DataLoader(six, batch_size=6)))
    predictions = net(images.to(DEVICE)).argmax(dim=1).cpu()

    figure = Figure(figsize=(9, 8), layout="constrained")
    *axes, curves = figure.subplots(4)
    rows = {"image": images,
            "ground truth": COLOURS[masks].movedim(-1, 1),  # (N, H, W, 3) to (N, 3, H, W)
            "prediction": COLOURS[predictions].movedim(-1, 1)}
    for axis, name in zip(axes, rows):
        axis.imshow(utils.make_grid(rows[name], nrow=6).movedim(0, -1).numpy())
        axis.set(title=name, xticks=[], yticks=[])

    epochs = range(1, len(saved["losses"]) + 1)
    curves.plot(epochs, saved["losses"], ".-", label=["train loss", "val loss"])
    curves.set_xlabel("epoch")
    curves.locator_params(axis="x", integer=True, min_n_ticks=1)
    for name, colour in zip(CLASSES, COLOURS.numpy() / 255):  # empty plots, for the legend
        curves.plot([], "s", color=colour, markeredgecolor="gray", label=name)
    figure.legend(loc="outside lower center", ncols=5)

    picture = Path(checkpoint).with_suffix(".png")
    figure.savefig(picture)
    print(f"wrote {picture}")

@torch.no_grad()
def predict(photo, checkpoint="unet.pt"):
    """Draw the prediction over a photo: cat.jpg gives ./cat-overlay.png."""
    saved, net = load(checkpoint)
    image = ImageOps.exif_transpose(Image.open(photo))  # turned upright
    if image.mode.startswith(("I", "F")):  # RGB would clip
        sys.exit(f"{photo} is not 8-bit: save it as 8-bit")
    image = image.convert("RGB")
    square = image.resize((saved["size"], saved["size"]), Image.BILINEAR)
    logits = net(pil_to_tensor(square)[None].to(DEVICE) / 255)  # a batch of one

    # Enlarged logits give smooth edges. Enlarged classes would give staircases.
    logits = nn.functional.interpolate(logits, image.size[::-1], mode="bilinear")
    colours = COLOURS[logits.argmax(dim=1)[0].cpu()]  # (H, W, 3)
    picture = f"{Path(photo).stem}-overlay.png"
    Image.blend(image, Image.fromarray(colours.numpy()), 0.5).save(picture)
    print(f"wrote {picture}")

# -------- the lesson ends here. Below: toy data and the command line --------
def draw_toy(seed):
    """A light polygon on a dark background, and its trimap."""
    rng = random.Random(seed)
    x, y, corners = rng.randint(60, 132), rng.randint(60, 100), rng.randint(3, 8)
    image = Image.new("RGB", (192, 160), f"hsl({rng.randrange(360)}, 50%, 30%)")
    light = f"hsl({rng.randrange(360)}, 50%, 70%)"
    ImageDraw.Draw(image).regular_polygon((x, y, 50), corners, fill=light)
    trimap = Image.new("L", (192, 160), 2)
    ImageDraw.Draw(trimap).regular_polygon((x, y, 50), corners, fill=1, outline=3, width=6)
    return image, trimap

def main():
    """Each command is a function above, with its parameters as options."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for function in (train, test, show, predict):
        command = commands.add_parser(function.__name__, description=function.__doc__,
                                      help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        for name, parameter in inspect.signature(function).parameters.items():
            default = parameter.default
            if default is parameter.empty:
                command.add_argument(name)
            else:
                command.add_argument("--" + name.replace("_", "-"), type=type(default),
                                     default=default, help="default: %(default)r")

    options = vars(parser.parse_args())
    function = options.pop("function")
    try:
        function(**options)
    except OSError as error:  # such as a missing file
        sys.exit(f"stopped: {error}")

if __name__ == "__main__":
    main()
