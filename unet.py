"""U-Net: is a pixel of this photo pet, background or border?

    photo   (3, 128, 128)                                 logits   (3, 128, 128)
    enc1   (64, 128, 128) ------------ skip ------------> dec1   (64, 128, 128)
       enc2  (128, 64, 64) ----------- skip ---------> dec2  (128, 64, 64)
          enc3  (256, 32, 32) -------- skip ------> dec3  (256, 32, 32)
             enc4  (512, 16, 16) ----- skip ---> dec4  (512, 16, 16)
                         bottleneck  (1024, 8, 8)

Shapes are (channels, height, width). The photo's channels are red, green, blue.
A pixel's 3 logits are a number for each class, and the largest wins. A classifier
gives one answer per photo, this network one per pixel.

Down the left of the U, the encoder halves height and width, so that a pixel sums
up more of the photo, and doubles the channels, to say more about it: it finds
what is there but loses where. From the bottleneck up the right, the decoder makes
the picture large again, and skips tell it what the encoder saw, and where.
The paper (Ronneberger, Fischer, Brox 2015, arxiv.org/abs/1505.04597) does without
padding and BatchNorm, with dropout, SGD, and elastic deformation.

`python unet.py train --epochs 5` fetches the Oxford-IIIT Pet photos, trains and
writes unet.pt; `test` scores it, `show` draws predictions, `predict PHOTO` takes
any photo. `--data toy` needs no download. The lesson ends at "the machine"."""
import argparse, math, os, random, sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision import datasets, utils
from torchvision.transforms.functional import hflip, pil_to_tensor

# -------- data --------
# Mask files (trimaps) give each pixel 1, 2 or 3; border is the outline, left unclassified.
# For other classes change this dict, for other files `open_pairs`.
CLASSES = {"pet": (230, 159, 0), "background": (0, 90, 150), "border": (240, 240, 240)}
COLOURS = torch.tensor(list(CLASSES.values()), dtype=torch.uint8)  # (classes, 3)

class PetDataset(Dataset):
    """Pairs (photo, trimap) of PIL pictures, squashed to squares and kept as uint8: colours
    (3, size, size) and classes (size, size), 64 KiB a pair at size 128. mirror flips them
    left to right half of the time."""
    def __init__(self, pairs, size, mirror=False):
        self.mirror = mirror
        self.samples = []
        if not pairs:
            sys.exit("the data has too few photos")
        print(f"decoding {len(pairs)} photos", flush=True)
        for photo, trimap in pairs:
            # Grey: small.convert("L") here and in predict, in_channels=1 in train.
            small = photo.resize((size, size), Image.BILINEAR)
            # NEAREST copies labels: a mean of pet (1) and border (3) is background (2).
            labels = trimap.resize((size, size), Image.NEAREST)
            mask = pil_to_tensor(labels)[0].long() - 1  # PyTorch counts from 0
            if photo.size != trimap.size or mask.min() < 0 or mask.max() >= len(CLASSES):
                sys.exit(f"{getattr(trimap, 'filename', 'a trimap')} needs its photo's size "
                         f"and labels from 1 to {len(CLASSES)}")
            self.samples.append((pil_to_tensor(small), mask.byte()))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        photo, mask = self.samples[i]
        # A mirrored pet is still a pet: more photos for free. What moves pixels must
        # move the mask too; what changes colours must leave it alone.
        if self.mirror and torch.rand(1) < 0.5:
            photo, mask = hflip(photo), hflip(mask)
        return photo, mask

# -------- model --------
def conv_block(in_ch, out_ch):
    """(N, in_ch, H, W) to (N, out_ch, H, W). Two 3x3 convolutions see as far as one of
    5x5, with one more ReLU. BatchNorm brings each channel of a batch to mean 0 and
    variance 1, then applies a learned scale and bias: the convolutions need no bias."""
    return nn.Sequential(
        nn.Conv2d(in_ch, out_ch, 3, padding=1, bias=False),  # padding keeps H and W
        nn.BatchNorm2d(out_ch),
        nn.ReLU(),
        nn.Conv2d(out_ch, out_ch, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_ch),
        nn.ReLU(),
    )

class UNet(nn.Module):
    """(N, in_channels, H, W) photos to (N, out_classes, H, W) logits; H and W multiples of 16."""
    def __init__(self, in_channels=3, out_classes=3, base=64, skips=True):
        super().__init__()
        self.skips = skips
        c1, c2, c3, c4, c5 = base, 2 * base, 4 * base, 8 * base, 16 * base
        self.enc1 = conv_block(in_channels, c1)
        self.enc2 = conv_block(c1, c2)
        self.enc3 = conv_block(c2, c3)
        self.enc4 = conv_block(c3, c4)
        self.pool = nn.MaxPool2d(2)  # the largest of 2x2 pixels: halves H and W
        self.bottleneck = conv_block(c4, c5)
        # Here a transposed convolution turns a pixel into 2x2, with half the channels.
        # The skip, stacked on top, doubles them again: c4 + c4.
        self.up4 = nn.ConvTranspose2d(c5, c4, 2, stride=2)
        self.dec4 = conv_block(c4 + c4, c4)
        self.up3 = nn.ConvTranspose2d(c4, c3, 2, stride=2)
        self.dec3 = conv_block(c3 + c3, c3)
        self.up2 = nn.ConvTranspose2d(c3, c2, 2, stride=2)
        self.dec2 = conv_block(c2 + c2, c2)
        self.up1 = nn.ConvTranspose2d(c2, c1, 2, stride=2)
        self.dec1 = conv_block(c1 + c1, c1)
        # A 1x1 convolution sees no neighbours: the same classifier at every pixel.
        self.final = nn.Conv2d(c1, out_classes, 1)
        # Kaiming He's initialisation (the paper, section 3): variance 2 / inputs, as ReLU
        # zeroes half. (PyTorch counts those of up4 to up1 twice.) Its default costs 0.04 mIoU.
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x):                   # (N,    3, 128, 128)  for base=64, size=128
        e1 = self.enc1(x)                   # (N,   64, 128, 128)  the skip, not yet pooled
        e2 = self.enc2(self.pool(e1))       # (N,  128,  64,  64)
        e3 = self.enc3(self.pool(e2))       # (N,  256,  32,  32)
        e4 = self.enc4(self.pool(e3))       # (N,  512,  16,  16)
        b = self.bottleneck(self.pool(e4))  # (N, 1024,   8,   8)
        if not self.skips:  # zeros keep the network's size, for a fair comparison
            e1, e2, e3, e4 = map(torch.zeros_like, (e1, e2, e3, e4))
        # Stacked along dim 1, the channels, and not added: dec4 learns how to mix them.
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

def compute_logits(net, photos):
    """uint8 photos (N, 3, H, W) to float32 logits (N, classes, H, W). LAYOUT, BF16: see the end."""
    x = photos.to(DEVICE, memory_format=LAYOUT).float() / 255
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16):
        return net(x).float()

# -------- losses and metrics --------
def dice_loss(logits, target):
    """1 - Dice, averaged over classes. Dice: twice the pixels that prediction and truth
    share, divided by the sum of the pixels that each has. A pixel counts with its
    probability, since argmax has no gradient."""
    probability = logits.softmax(dim=1)
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1)  # (N, C, H, W) of 0 and 1
    shared = (probability * truth).sum((0, 2, 3))  # (C,)
    total = (probability + truth).sum((0, 2, 3))   # (C,)
    dice = (2 * shared + 1) / (total + 1)  # + 1: never 0 / 0
    return 1 - dice.mean()

# From logits (N, C, H, W) and the true classes (N, H, W) to a scalar.
LOSSES = {
    "ce": nn.CrossEntropyLoss(),  # contains the softmax; all pixels weigh alike
    "dice": dice_loss,  # all classes weigh alike
    "ce+dice": lambda logits, target: F.cross_entropy(logits, target) + dice_loss(logits, target),
}

def metrics(confusion):
    """Turn pixel counts (row: true class, column: predicted class) into each class's IoU,
    intersection over union of the two, and the means mIoU and Dice; 0 / 0 = nan is left out."""
    intersection = confusion.diag()
    total = confusion.sum(dim=0) + confusion.sum(dim=1)
    iou = intersection / (total - intersection)  # total has the shared twice
    dice = 2 * intersection / total
    return {"mIoU": iou.nanmean().item(), "Dice": dice.nanmean().item(),
            **dict(zip(CLASSES, iou.tolist()))}

@torch.no_grad()
def evaluate(net, dataset, loss_fn):
    """The mean loss, and the metrics of all pixels together."""
    net.eval()  # BatchNorm uses means and variances kept from training
    n = len(CLASSES)
    total_loss = confusion = 0
    for photos, masks in DataLoader(dataset, batch_size=8):  # train's default
        logits = compute_logits(net, photos)
        target = masks.to(DEVICE).long()
        total_loss += loss_fn(logits, target).item() * len(photos)
        # Entries are numbered row by row: true 2 predicted as 1 is 3 * 2 + 1 = 7.
        entry = n * target + logits.argmax(dim=1)
        confusion += entry.flatten().bincount(minlength=n * n).view(n, n).cpu()
    return total_loss / len(dataset), metrics(confusion)

# -------- training --------
def train(args):
    """train a network, validated and saved after each epoch"""
    # args, from main: epochs=5, batch_size=8, size=128, base=64, lr=4e-3, loss="ce" ...
    pairs = open_pairs(args.data, "trainval")
    # The list runs breed by breed: without a shuffle, validation would meet other breeds
    # than training. The fixed seed validates all runs on the same photos.
    train_pairs, val_pairs = random_split(pairs, (0.8, 0.2), torch.Generator().manual_seed(0))
    train_set = PetDataset(train_pairs, args.size, mirror=True)
    val_set = PetDataset(val_pairs, args.size)
    loader = DataLoader(train_set, args.batch_size, shuffle=True)
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    config = dict(in_channels=3, out_classes=len(CLASSES), base=args.base, skips=not args.no_skips)
    net = UNet(**config).to(DEVICE, memory_format=LAYOUT)
    loss_fn = LOSSES[args.loss]
    # betas: how long AdamW remembers. Its default, (0.9, 0.999), costs 0.02 mIoU.
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.5, 0.99))
    # The learning rate rises, since random weights cannot take large steps, then falls
    # to almost 0, to let them settle. cycle_momentum would change the first beta.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * len(loader),
        anneal_strategy="linear", cycle_momentum=False)

    history = []
    for epoch in range(1, args.epochs + 1):
        net.train()
        total_loss = 0
        for step, (photos, masks) in enumerate(loader, 1):
            logits = compute_logits(net, photos)
            loss = loss_fn(logits, masks.to(DEVICE).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item()
            if sys.stdout.isatty():
                print(f"step {step} of {len(loader)}  loss {loss:.3f}", end="\r", flush=True)
        train_loss = total_loss / len(loader)
        val_loss, scores = evaluate(net, val_set, loss_fn)
        if not math.isfinite(train_loss + val_loss):
            sys.exit(f"the loss is not finite; try a --lr below {args.lr}")
        print(f"epoch {epoch}  loss {train_loss:.3f}  val loss {val_loss:.3f}  "
              f"mIoU {scores['mIoU']:.3f}", flush=True)
        history.append({"train loss": train_loss, "val loss": val_loss, **scores})
        torch.save({"model": net.state_dict(), "config": config, "size": args.size,
                    "loss": args.loss, "history": history}, f"{args.checkpoint}.tmp")
        os.replace(f"{args.checkpoint}.tmp", args.checkpoint)  # never half a file
    print(f"wrote {args.checkpoint}")

# -------- using it --------
def test(args):
    """score a checkpoint on the official test photos"""
    saved, net = load_checkpoint(args.checkpoint)
    test_set = PetDataset(open_pairs(args.data, "test"), saved["size"])
    loss, scores = evaluate(net, test_set, LOSSES[saved["loss"]])
    print(f"loss {loss:.3f}", *(f" {name} {value:.3f}" for name, value in scores.items()))

def show(args):
    """draw test photos, truth, predictions, and training curves"""
    saved, net = load_checkpoint(args.checkpoint)
    pairs = open_pairs(args.data, "test")
    some = [pairs[i] for i in range(0, len(pairs), len(pairs) // 6 + 1)]  # at most 6
    photos, masks = next(iter(DataLoader(PetDataset(some, saved["size"]), batch_size=6)))
    truth = COLOURS[masks.long()].movedim(-1, 1)
    prediction = COLOURS[compute_logits(net, photos).argmax(dim=1).cpu()].movedim(-1, 1)
    rows = {"input": photos, "ground truth": truth, "prediction": prediction}
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    *axes, curves = figure.subplots(4)
    for ax, (name, pictures) in zip(axes, rows.items()):
        ax.imshow(utils.make_grid(pictures).movedim(0, -1).numpy())
        ax.set(xticks=[], yticks=[], ylabel=name)
    for name, colour in zip(CLASSES, COLOURS.numpy() / 255):  # legend entries
        curves.plot([], "s", color=colour, markeredgecolor="gray", label=name)
    epochs = range(1, len(saved["history"]) + 1)
    for key in ("train loss", "val loss", "mIoU"):
        curves.plot(epochs, [row[key] for row in saved["history"]], ".-", label=key)
    curves.set(xlabel="epoch", xticks=epochs[::1 + len(epochs) // 20])  # at most 20
    figure.legend(loc="outside lower center", ncols=6)
    figure.savefig(f"{args.checkpoint.stem}.png")
    print(f"wrote {args.checkpoint.stem}.png")

def predict(args):
    """segment any photo: the mask drawn over it, at its own size"""
    saved, net = load_checkpoint(args.checkpoint)
    photo = ImageOps.exif_transpose(Image.open(args.photo)).convert("RGB")  # upright
    small = photo.resize((saved["size"], saved["size"]), Image.BILINEAR)
    logits = compute_logits(net, pil_to_tensor(small).unsqueeze(0))
    # Resized labels would have blocky edges; resized logits do not.
    logits = F.interpolate(logits, size=(photo.height, photo.width), mode="bilinear")
    mask = Image.fromarray(COLOURS[logits[0].argmax(dim=0).cpu()].numpy())
    Image.blend(photo, mask, alpha=0.5).save(f"{args.photo.stem}-mask.png")
    print(f"wrote {args.photo.stem}-mask.png")

# -------- the machine --------
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
# channels_last is mostly faster; on Apple's GPUs it broke BatchNorm (PyTorch #175189).
LAYOUT = torch.contiguous_format if DEVICE.type == "mps" else torch.channels_last
# 16-bit numbers (bf16) where the hardware multiplies them fast.
BF16 = (torch.cuda.is_bf16_supported(including_emulation=False) if DEVICE.type == "cuda"
        else DEVICE.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False))

def open_pairs(root, split):
    """The (photo, trimap) pairs of the list "trainval" or "test", or drawings."""
    if root == "toy":
        return [draw_pair(f"{split} {i}") for i in range(300)]
    try:
        return datasets.OxfordIIITPet(root, split, "segmentation", download=True)
    except Exception as error:
        sys.exit(f"--data {root}: {error}. If downloads fail, put images.tar.gz and "
                 f"annotations.tar.gz into {root}/oxford-iiit-pet, or try --data toy")

def draw_pair(name):
    """A speckled polygon and its trimap; the name is the seed."""
    rng = random.Random(name)
    trimap = Image.new("L", (192, 160), 2)
    circle = rng.randint(60, 132), rng.randint(60, 100), rng.randint(40, 60)  # x, y, radius
    ImageDraw.Draw(trimap).regular_polygon(circle, rng.randint(3, 8), fill=1, outline=3, width=6)
    photo = Image.frombytes("RGB", (40, 40), rng.randbytes(4800)).resize(trimap.size)
    photo.paste(tuple(rng.randbytes(3)), mask=trimap.point(lambda label: 255 * (label == 2)))
    return photo, trimap

def load_checkpoint(path):
    """What `train` saved, a dict, and its network: frozen, in evaluation mode."""
    try:
        saved = torch.load(path, map_location="cpu")
        net = UNet(**saved["config"])
        net.load_state_dict(saved["model"])
    except Exception as error:
        sys.exit(f"{path} is no checkpoint of this UNet ({type(error).__name__}); train one")
    return saved, net.to(DEVICE).eval().requires_grad_(False)

def main(argv=None):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for run in (train, test, show, predict):
        command = commands.add_parser(run.__name__, help=run.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        add = command.add_argument
        if run is predict:
            add("photo", type=Path, help="image file")
        else:
            add("--data", default="data", help="dataset folder, filled if missing; or toy")
        if run is train:
            add("--epochs", type=int, default=5, help="passes over the photos")
            add("--batch-size", type=int, default=8, help="photos in one step")
            add("--size", type=int, default=128, help="photos become size x size pixels")
            add("--base", type=int, default=64, help="channels of the first level")
            add("--lr", type=float, default=4e-3, help="highest learning rate")
            add("--loss", choices=LOSSES, default="ce", help="cross-entropy, Dice or both")
            add("--no-skips", action="store_true", help="cut the skips, to see their use")
            add("--seed", type=int, default=0, help="of weights, order and mirroring")
        add("--checkpoint", type=Path, default="unet.pt", help="the trained network")
    args = parser.parse_args(argv)
    if args.run is train:
        if args.size < 32 or args.size % 16:
            sys.exit("--size must be a multiple of 16, at least 32")
        if min(args.epochs, args.batch_size, args.base) < 1 or not 0 < args.lr <= 1:
            sys.exit("--epochs, --batch-size, --base: at least 1; --lr: above 0, up to 1")
        if args.checkpoint.is_dir():
            sys.exit(f"--checkpoint {args.checkpoint} is a folder")
    try:
        args.run(args)
    except (OSError, SyntaxError, KeyboardInterrupt) as error:  # SyntaxError: a broken PNG
        sys.exit(str(error) or "\nstopped")

if __name__ == "__main__":
    main()
