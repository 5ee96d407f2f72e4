"""U-Net: which pixels of a photo are pet, which background, which the border between?

    photo   (3, 128, 128)                                 logits   (3, 128, 128)
    enc1   (64, 128, 128) ------------ skip ------------> dec1   (64, 128, 128)
       enc2  (128, 64, 64) ----------- skip ---------> dec2  (128, 64, 64)
          enc3  (256, 32, 32) -------- skip ------> dec3  (256, 32, 32)
             enc4  (512, 16, 16) ----- skip ---> dec4  (512, 16, 16)
                         bottleneck  (1024, 8, 8)

A classifier gives a photo one class, segmentation gives each pixel one: a mask. A pixel
gets a logit, a number, for each class, and the largest wins. Down the left of the U, the
encoder halves height and width, so that a pixel sums up more of the photo, and doubles
the channels (the first number), to say more: it finds what is there, but loses where.
Up the right, from the bottleneck, the decoder makes the picture large again, and skips
hand it what the encoder saw before each halving. Unlike the paper (Ronneberger et al.
2015, arxiv 1505.04597), this file pads, so that skips fit uncropped; has BatchNorm, for
larger steps; and no dropout or elastic deformation, as its photos are many, not 30.

`python unet.py train --epochs 5` fetches the Oxford-IIIT Pet photos and trains. Then
`python unet.py show` draws predictions, `test` scores. `--data toy` needs no download."""
import argparse, inspect, math, os, random, re, sys
from pathlib import Path
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision import datasets, utils
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

# -------- data --------
# A trimap, the picture of a mask, labels each pixel 1, 2 or 3: pet, background, border.
# For other classes change this dict, for other files `open_pairs`.
CLASSES = {"pet": (230, 159, 0), "background": (0, 90, 150), "border": (240, 240, 240)}
COLOURS = torch.tensor(list(CLASSES.values()), dtype=torch.uint8)  # (classes, 3)

def open_pairs(data, split):
    """PIL pictures, in pairs (RGB photo, trimap), of the split "trainval" or "test"."""
    if data == "toy":
        return [draw_pair(f"{split} {i}") for i in range(300)]
    return datasets.OxfordIIITPet(data, split, "segmentation", download=True)

def shrink(photo, size):
    """A PIL photo of any shape, squashed to a square: uint8 (3, size, size)."""
    return pil_to_tensor(photo.resize((size, size), Image.BILINEAR))

class PetDataset(Dataset):
    """Photos, uint8 (3, size, size), and masks of classes, int64 (size, size). It keeps
    both as bytes, 64 KiB a pair at size 128. mirror=True flips them half of the time."""
    def __init__(self, pairs, size, mirror=False):
        self.mirror = mirror
        self.samples = []
        print(f"decoding {len(pairs)} photos")
        for photo, trimap in pairs:
            # NEAREST copies labels: the mean of pet (1) and border (3) would be background (2).
            labels = pil_to_tensor(trimap.resize((size, size), Image.NEAREST))[0].long()
            if labels.min() < 1 or labels.max() > len(CLASSES):
                raise ValueError(f"need labels 1-{len(CLASSES)}: {getattr(trimap, 'filename', '')}")
            mask = (labels - 1).byte()  # classes count from 0
            self.samples.append((shrink(photo, size), mask))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        photo, mask = self.samples[i]
        # What moves pixels must move the mask too; what changes colours must leave it alone.
        if self.mirror and torch.rand(1) < 0.5:
            photo, mask = photo.flip(-1), mask.flip(-1)
        return photo, mask.long()

# -------- model --------
def conv_block(in_ch, out_ch):
    """(N, in_ch, H, W) to (N, out_ch, H, W). Two 3x3 convolutions see as far as one of
    5x5, with one more ReLU. BatchNorm undoes a bias, and has its own."""
    return nn.Sequential(
        nn.Conv2d(in_ch, out_ch, 3, padding=1, bias=False),  # padding keeps H and W
        nn.BatchNorm2d(out_ch),  # each channel: mean 0, variance 1, then learned scale, bias
        nn.ReLU(),
        nn.Conv2d(out_ch, out_ch, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_ch),
        nn.ReLU())

class UNet(nn.Module):
    """(N, in_channels, H, W) photos to (N, out_classes, H, W) logits. H and W must be
    multiples of 16: halved four times, then doubled, they must fit the skips."""
    def __init__(self, in_channels=3, out_classes=len(CLASSES), base=64):
        super().__init__()
        c1, c2, c3, c4, c5 = base, 2 * base, 4 * base, 8 * base, 16 * base
        self.enc1 = conv_block(in_channels, c1)
        self.enc2 = conv_block(c1, c2)
        self.enc3 = conv_block(c2, c3)
        self.enc4 = conv_block(c3, c4)
        self.pool = nn.MaxPool2d(2)  # the largest of 2x2 pixels: halves H and W
        self.bottleneck = conv_block(c4, c5)

        self.up4 = nn.ConvTranspose2d(c5, c4, 2, stride=2)  # learned: one pixel to 2x2
        self.dec4 = conv_block(c4 + c4, c4)  # up4's channels + the skip's
        self.up3 = nn.ConvTranspose2d(c4, c3, 2, stride=2)
        self.dec3 = conv_block(c3 + c3, c3)
        self.up2 = nn.ConvTranspose2d(c3, c2, 2, stride=2)
        self.dec2 = conv_block(c2 + c2, c2)
        self.up1 = nn.ConvTranspose2d(c2, c1, 2, stride=2)
        self.dec1 = conv_block(c1 + c1, c1)
        self.final = nn.Conv2d(c1, out_classes, 1)  # sees no neighbours: one classifier

        # He initialisation (the paper, section 3) keeps signals from fading and exploding:
        # variance 2 / inputs (1 / inputs in up4 to up1). PyTorch's default scores 0.03 lower.
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x):                   # (N,    3, 128, 128)  for base=64, size=128
        e1 = self.enc1(x)                   # (N,   64, 128, 128)  a skip, not yet pooled
        e2 = self.enc2(self.pool(e1))       # (N,  128,  64,  64)
        e3 = self.enc3(self.pool(e2))       # (N,  256,  32,  32)
        e4 = self.enc4(self.pool(e3))       # (N,  512,  16,  16)
        b = self.bottleneck(self.pool(e4))  # (N, 1024,   8,   8)

        d4 = self.up4(b)                    # (N,  512,  16,  16)
        d4 = torch.cat((d4, e4), dim=1)     # (N, 1024,  16,  16)  dim 1: the channels
        d4 = self.dec4(d4)                  # (N,  512,  16,  16)

        d3 = self.up3(d4)                   # (N,  256,  32,  32)
        d3 = torch.cat((d3, e3), dim=1)     # (N,  512,  32,  32)  not added: dec3 learns to mix
        d3 = self.dec3(d3)                  # (N,  256,  32,  32)

        d2 = self.up2(d3)                   # (N,  128,  64,  64)
        d2 = torch.cat((d2, e2), dim=1)     # (N,  256,  64,  64)  (try 0 * e2: no skip)
        d2 = self.dec2(d2)                  # (N,  128,  64,  64)

        d1 = self.up1(d2)                   # (N,   64, 128, 128)
        d1 = torch.cat((d1, e1), dim=1)     # (N,  128, 128, 128)
        d1 = self.dec1(d1)                  # (N,   64, 128, 128)
        return self.final(d1)               # (N,    3, 128, 128)

# -------- device --------
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
# For speed alone. channels_last: a pixel's channels side by side in memory (on Apple's
# GPUs it broke BatchNorm, PyTorch issue 175189). BF16: 16-bit numbers, where they are fast.
LAYOUT = torch.contiguous_format if DEVICE.type == "mps" else torch.channels_last
BF16 = DEVICE.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
if DEVICE.type == "cuda":
    BF16 = torch.cuda.is_bf16_supported(including_emulation=False)

def compute_logits(net, photos):
    """uint8 photos (N, 3, H, W) to float32 logits (N, classes, H, W), on DEVICE."""
    x = photos.to(DEVICE, memory_format=LAYOUT).float() / 255
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16):
        return net(x).float()

# -------- losses and scores --------
def one_hot(classes):
    """(N, H, W) classes to (N, C, H, W): a pixel of class 2 becomes 0, 0, 1."""
    return F.one_hot(classes, len(CLASSES)).movedim(-1, 1)

def count_pixels(prediction, truth):
    """Two (N, C, H, W) to (2, C): each class's overlap (1 * 1) and the sum of areas."""
    shared = (prediction * truth).sum((0, 2, 3))
    total = (prediction + truth).sum((0, 2, 3))
    return torch.stack((shared, total))

def dice_loss(logits, target):
    """1 - the mean Dice of the classes. Dice is 2 * shared / total: 1 if prediction and
    truth agree, 0 without overlap. From softmax: argmax has no gradient."""
    shared, total = count_pixels(logits.softmax(dim=1), one_hot(target))
    dice = (2 * shared + 1) / (total + 1)  # + 1: no 0 / 0
    return 1 - dice.mean()

# Cross-entropy (softmax included) weighs pixels alike; Dice classes, small ones too.
LOSSES = {"ce": nn.CrossEntropyLoss(), "dice": dice_loss}

@torch.no_grad()
def evaluate(net, dataset, loss_fn):
    """The mean loss and, over all pixels, each class's IoU (intersection over union), their
    mean, mIoU, and the mean Dice. A class that is nowhere (nan) is left out of means."""
    net.eval()  # BatchNorm uses the means and variances that it kept in training
    loss = counts = 0
    for photos, masks in DataLoader(dataset, batch_size=8):
        logits, target = compute_logits(net, photos), masks.to(DEVICE)
        loss += loss_fn(logits, target).item() * len(photos)
        counts += count_pixels(one_hot(logits.argmax(dim=1)), one_hot(target))

    shared, total = counts
    iou = shared / (total - shared)  # total counts the shared ones twice
    dice = 2 * shared / total
    return {"unseen loss": loss / len(dataset), "mIoU": iou.nanmean().item(),
            "Dice": dice.nanmean().item(), **dict(zip(CLASSES, iou.tolist()))}

# -------- training --------
def train_epoch(net, loader, loss_fn, optimizer, schedule):
    """Learn from each photo once; return the mean loss, taken while the weights changed."""
    net.train()  # BatchNorm uses the means and variances of the batch
    total_loss = 0
    for step, (photos, masks) in enumerate(loader, 1):
        loss = loss_fn(compute_logits(net, photos), masks.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        total_loss += loss.item()
        if sys.stdout.isatty():
            print(f"step {step} of {len(loader)}  loss {loss:.3f}", end="\r", flush=True)
    return total_loss / len(loader)

def save(checkpoint, net, **facts):
    torch.save({"model": net.state_dict(), **facts}, f"{checkpoint}.tmp")
    os.replace(f"{checkpoint}.tmp", checkpoint)  # never half a checkpoint

def load(checkpoint):
    """The dict that `save` wrote, and its network, ready to predict."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    net = UNet(base=saved["base"]).to(DEVICE, memory_format=LAYOUT)
    net.load_state_dict(saved["model"])
    return saved, net.eval().requires_grad_(False)

def train(data="data", checkpoint="unet.pt", epochs=5, batch_size=8, size=128, base=64,
          lr=4e-3, loss="ce", seed=0):
    """Train a network; validate and save it each epoch.
    data: folder of the photos, fetched if missing; or toy, for drawings
    checkpoint: file of the trained network
    epochs: passes over the photos
    batch_size: photos in a step
    size: photos are squashed to size x size pixels
    base: channels of the first level
    lr: highest learning rate
    loss: ce for cross-entropy, or dice
    seed: of the first weights, the order of the photos and the mirroring"""
    if size % 16 or size < 32:  # at 16, BatchNorm is left one pixel a photo
        raise ValueError(f"size must be a multiple of 16 and at least 32, not {size}")

    # The list runs breed by breed: without a shuffle, validation would meet other breeds
    # than training. The fixed seed validates all runs on the same photos.
    torch.manual_seed(0)
    train_pairs, val_pairs = random_split(open_pairs(data, "trainval"), (0.8, 0.2))
    train_set = PetDataset(train_pairs, size, mirror=True)
    val_set = PetDataset(val_pairs, size)
    Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed)
    loader = DataLoader(train_set, batch_size, shuffle=True)
    net = UNet(base=base).to(DEVICE, memory_format=LAYOUT)
    # betas: how long AdamW remembers. Its default, (0.9, 0.999), scores 0.01 lower.
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.5, 0.99))
    # The learning rate rises, as large steps upset new weights, then falls almost to 0.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=epochs * len(loader), anneal_strategy="linear",
        cycle_momentum=False)  # True would change the 0.5

    history = []
    for epoch in range(1, epochs + 1):
        train_loss = train_epoch(net, loader, LOSSES[loss], optimizer, schedule)
        scores = evaluate(net, val_set, LOSSES[loss])
        if not math.isfinite(train_loss + scores["unseen loss"]):
            raise ValueError(f"the loss is not finite: try an lr below {lr}")
        print(f"epoch {epoch} on {DEVICE}  train loss {train_loss:.3f}  unseen loss "
              f"{scores['unseen loss']:.3f}  mIoU {scores['mIoU']:.3f}", flush=True)
        history.append({"train loss": train_loss, **scores})
        save(checkpoint, net, base=base, size=size, loss=loss, history=history)
    print(f"wrote {checkpoint}")

# -------- using it --------
def test(data="data", checkpoint="unet.pt"):
    """Score a network on the official test photos."""
    saved, net = load(checkpoint)
    test_set = PetDataset(open_pairs(data, "test"), saved["size"])
    scores = evaluate(net, test_set, LOSSES[saved["loss"]])
    print("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))

def paint(classes):
    """Classes (..., H, W) to their colours, uint8 (..., 3, H, W), on the CPU."""
    return COLOURS[classes.cpu()].movedim(-1, -3)

def show(data="data", checkpoint="unet.pt"):
    """Draw test photos, truth, predictions, and training curves: unet.pt to unet.png."""
    saved, net = load(checkpoint)
    pairs = open_pairs(data, "test")
    some = [pairs[i] for i in range(0, len(pairs), math.ceil(len(pairs) / 6))]  # at most 6
    photos, masks = next(iter(DataLoader(PetDataset(some, saved["size"]), batch_size=6)))
    prediction = compute_logits(net, photos).argmax(dim=1)

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    *axes, curves = figure.subplots(4)
    rows = {"input": photos, "ground truth": paint(masks), "prediction": paint(prediction)}
    for ax, (name, pictures) in zip(axes, rows.items()):
        ax.imshow(utils.make_grid(pictures).movedim(0, -1).numpy())
        ax.set(xticks=[], yticks=[], ylabel=name)

    for name, colour in zip(CLASSES, COLOURS.numpy() / 255):  # for the legend alone
        curves.plot([], "s", color=colour, markeredgecolor="gray", label=name)
    epochs = range(1, len(saved["history"]) + 1)
    for name in ("train loss", "unseen loss", "mIoU"):
        curves.plot(epochs, [row[name] for row in saved["history"]], ".-", label=name)
    curves.set(xlabel="epoch", xticks=epochs[::1 + len(epochs) // 20])  # at most 20

    figure.legend(loc="outside lower center", ncols=6)
    figure.savefig(f"{Path(checkpoint).stem}.png")
    print(f"wrote {Path(checkpoint).stem}.png")

def predict(photo, checkpoint="unet.pt"):
    """Draw the classes over any photo, at its own size: cat.jpg to cat-mask.png."""
    saved, net = load(checkpoint)
    picture = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")  # upright
    logits = compute_logits(net, shrink(picture, saved["size"])[None])
    # Enlarge the logits: enlarged classes would have blocky edges.
    logits = F.interpolate(logits, size=(picture.height, picture.width), mode="bilinear")
    colours = to_pil_image(paint(logits.argmax(dim=1)[0]))
    Image.blend(picture, colours, 0.5).save(f"{Path(photo).stem}-mask.png")
    print(f"wrote {Path(photo).stem}-mask.png")

# -------- the lesson ends here: toys, and the command line --------
def draw_pair(name):
    """A light polygon on a dark ground, and its trimap; the name is the seed."""
    rng = random.Random(name)
    shape = (rng.randint(60, 132), rng.randint(60, 100), 50), rng.randint(3, 8)  # circle, corners
    photo = Image.new("RGB", (192, 160), f"hsl({rng.randrange(360)}, 50%, 30%)")
    trimap = Image.new("L", (192, 160), 2)
    ImageDraw.Draw(photo).regular_polygon(*shape, fill=f"hsl({rng.randrange(360)}, 50%, 70%)")
    ImageDraw.Draw(trimap).regular_polygon(*shape, fill=1, outline=3, width=6)
    return photo, trimap

def main():
    """Make each function a command, each parameter an option of its default's type."""
    texts = dict(re.findall(r"(\w+): (.+)", train.__doc__))
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for run in (train, test, show, predict):
        command = commands.add_parser(run.__name__, help=run.__doc__.splitlines()[0])
        command.set_defaults(run=run)
        for name, parameter in inspect.signature(run).parameters.items():
            default = parameter.default
            if default is parameter.empty:
                command.add_argument(name)
            else:  # True or False would need argparse.BooleanOptionalAction
                command.add_argument(
                    "--" + name.replace("_", "-"), default=default, type=type(default),
                    choices=LOSSES if name == "loss" else None,
                    help=f"{texts.get(name, '')} (default: {default})")
    options = vars(parser.parse_args())
    try:
        options.pop("run")(**options)
    except OSError as error:  # no such file, no picture, no internet
        sys.exit(f"{error} (see README.md)")
    except KeyboardInterrupt:
        sys.exit("\nstopped")

if __name__ == "__main__":
    main()
