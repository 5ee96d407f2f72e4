"""U-Net for image segmentation in one file: is a pixel pet, background or border?

    photo   (3, 128, 128)                                 logits   (3, 128, 128)
    enc1   (64, 128, 128) ------------ skip ------------> dec1   (64, 128, 128)
       enc2  (128, 64, 64) ----------- skip ---------> dec2  (128, 64, 64)
          enc3  (256, 32, 32) -------- skip ------> dec3  (256, 32, 32)
             enc4  (512, 16, 16) ----- skip ---> dec4  (512, 16, 16)
                         bottleneck  (1024, 8, 8)

Going down, each level halves height and width and doubles the channels: the
network learns what is in the photo and loses where. Going up undoes that, and
the skips bring back the where. The paper: Ronneberger, Fischer, Brox 2015,
arxiv.org/abs/1505.04597. Two departures, padding and BatchNorm, are named where
they happen; its dropout is off unless --dropout asks for it.

`python unet.py train --epochs 5` fetches the Oxford-IIIT Pet photos, trains and
writes unet.pt; then `test` scores it, `show` draws predictions and curves,
`predict PHOTO` segments a photo of your own, `shapes` prints the shapes above.
With `--data toy` they work on drawings, without a download.
"""
import argparse, math, os, random, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset

# ------------------------------------------- data -------------------------------------------------
# A trimap labels each pixel 1, 2 or 3 for one of these classes, here with the colours (RGB) to draw
# them in. The border is the band around a pet that its annotators left undecided.
CLASSES = {"pet": (230, 159, 0), "background": (0, 90, 150), "border": (240, 240, 240)}

def draw_pair(seed):
    """A toy photo and its trimap, PIL images like those of the dataset: a furry polygon."""
    rng, trimap = random.Random(seed), Image.new("L", (192, 160), 2)  # all background
    circle = rng.randint(60, 132), rng.randint(60, 100), rng.randint(40, 60)  # x, y, radius
    corners, angle = rng.randint(3, 8), rng.randint(0, 90)
    ImageDraw.Draw(trimap).regular_polygon(circle, corners, angle, fill=1, outline=3, width=6)
    fur, wall = (Image.frombytes("RGB", (n, n), rng.randbytes(3 * n * n)) for n in (40, 4))  # noise
    shape = trimap.point(lambda label: 255 * (label != 2))
    return Image.composite(fur.resize(shape.size), wall.resize(shape.size), shape), trimap

def open_pairs(root, split):
    """The (photo, trimap) pairs of the official list "trainval" or "test", and their names."""
    if root == "toy":
        seeds = range(300) if split == "trainval" else range(300, 400)
        return [draw_pair(seed) for seed in seeds], seeds
    from torchvision.datasets import OxfordIIITPet  # imported here, so that --help need not wait
    folder = Path(root, "oxford-iiit-pet")
    try:
        pairs = OxfordIIITPet(root, split, target_types="segmentation", download=True)
        rows = Path(folder, "annotations", f"{split}.txt").read_text().splitlines()
        return pairs, [row.split()[0] for row in rows]
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"--data {root}: {split}.txt missing or broken ({error}). If downloads fail, "
                      f"put images.tar.gz and annotations.tar.gz into {folder}, or use --data toy")

def load_pair(pairs, names, i, size):
    """Pair i as uint8 tensors: a photo (3, size, size) and its mask (size, size)."""
    from torchvision.transforms.functional import pil_to_tensor
    try:
        photo, trimap = pairs[i]
        low, high = trimap.getextrema()
        if photo.size != trimap.size or low < 1 or high > len(CLASSES):
            raise ValueError(f"sizes {photo.size} and {trimap.size} must be equal, labels {low} to "
                             f"{high} within 1 to {len(CLASSES)}")
    except Exception as error:  # on a broken file, Pillow raises even SyntaxError
        raise ValueError(f"{names[i]}.jpg or its trimap .png is not usable: {error}") from error
    photo = photo.resize((size, size), Image.Resampling.BILINEAR)
    # NEAREST, since the mean of pet (1) and border (3) would be a false background (2).
    trimap = trimap.resize((size, size), Image.Resampling.NEAREST)
    return pil_to_tensor(photo), pil_to_tensor(trimap)[0] - 1  # PyTorch counts classes from 0

class PetDataset(Dataset):
    """The "train", "val" or "test" pairs, decoded once and kept: 64 KiB a pair at size 128.

    dataset[i]: a photo (3, size, size) of values 0 to 255 and its mask (size, size) of classes 0
    to 2, both uint8. Training pairs are mirrored at random.
    """
    def __init__(self, root, part, size, count=None):
        pairs, names = open_pairs(root, "test" if part == "test" else "trainval")
        # The lists run breed by breed: without a shuffle, validation would meet other breeds than
        # training. The seed is fixed, so that all runs are validated on the same photos.
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
        cut, self.mirror = int(0.8 * len(order)), part == "train"
        order = {"train": order[:cut], "val": order[cut:], "test": order}[part][:count]
        if not order:
            raise ValueError(f"--data {root}: its lists name too few photos for a {part} part")
        with ThreadPoolExecutor() as pool:  # threads suffice: Pillow decodes outside Python's lock
            self.pairs = list(pool.map(lambda i: load_pair(pairs, names, i, size), order))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        photo, mask = self.pairs[i]
        if self.mirror and torch.rand(()) < 0.5:  # half of the time, photo and mask alike
            photo, mask = photo.flip(-1), mask.flip(-1)
        return photo, mask

# ------------------------------------------- model ------------------------------------------------
def conv_block(in_ch, out_ch, norm=True, dropout=0.0):
    """Two 3x3 convolutions, each with BatchNorm and ReLU: (N, in_ch, H, W) to (N, out_ch, H, W)."""
    layers = []
    for channels in (in_ch, out_ch):
        # padding=1 keeps H and W; the paper pads nothing and must crop what its skips carry.
        # No bias before BatchNorm, which would subtract it again with the mean.
        layers.append(nn.Conv2d(channels, out_ch, kernel_size=3, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(out_ch))  # not in the paper; trains much faster
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.Dropout2d(dropout))

class UNet(nn.Module):
    """Photos (N, in_channels, H, W) to logits (N, out_classes, H, W); H and W are multiples of 16.

    base: channels of the first level. norm: whether BatchNorm is used. dropout: its probability, at
    the end of the encoder (paper, section 3.1). skip: how decoder and encoder features are joined,
    "concat" stacks them (the paper), "add" sums them, "none" leaves the encoder's out.
    """
    def __init__(self, in_channels=3, out_classes=3, base=64, skip="concat", norm=True, dropout=0):
        super().__init__()
        self.skip = skip
        c1, c2, c3, c4, c5 = (base * 2**level for level in range(5))  # 64, 128, 256, 512, 1024
        k = 2 if skip == "concat" else 1  # dec4 gets 1024 channels: 512 from up4, 512 from enc4
        self.pool = nn.MaxPool2d(2)  # halves H and W; up4 to up1 make 2x2 pixels of each again
        self.enc1 = conv_block(in_channels, c1, norm)
        self.enc2 = conv_block(c1, c2, norm)
        self.enc3 = conv_block(c2, c3, norm)
        self.enc4 = conv_block(c3, c4, norm, dropout)
        self.bottleneck = conv_block(c4, c5, norm, dropout)
        self.up4, self.dec4 = nn.ConvTranspose2d(c5, c4, 2, stride=2), conv_block(k * c4, c4, norm)
        self.up3, self.dec3 = nn.ConvTranspose2d(c4, c3, 2, stride=2), conv_block(k * c3, c3, norm)
        self.up2, self.dec2 = nn.ConvTranspose2d(c3, c2, 2, stride=2), conv_block(k * c2, c2, norm)
        self.up1, self.dec1 = nn.ConvTranspose2d(c2, c1, 2, stride=2), conv_block(k * c1, c1, norm)
        self.final = nn.Conv2d(c1, out_classes, kernel_size=1)  # a pixel's 64 features to 3 logits
        # He initialisation (section 3): a ReLU zeroes half of its inputs, so weights get a variance
        # of 2 / inputs, or 18 ReLUs fade the signal (PyTorch counts inputs of up4 to up1 twice).
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def join(self, up, enc):
        """The skip connection: decoder features meet encoder features of the same shape."""
        if self.skip == "concat":
            return torch.cat((up, enc), dim=1)  # 1: channels; 0 is the batch, 2 and 3 the pixels
        return up + enc if self.skip == "add" else up

    def forward(self, x):
        if x.shape[-2] % 16 or x.shape[-1] % 16:  # pooling would round down and a skip not fit
            raise ValueError(f"input is {x.shape[-2]}x{x.shape[-1]}; both must be multiples of 16")
        # Shapes for base 64, size 128:  x    (N,    3, 128, 128)
        e1 = self.enc1(x)                   # (N,   64, 128, 128)
        e2 = self.enc2(self.pool(e1))       # (N,  128,  64,  64)
        e3 = self.enc3(self.pool(e2))       # (N,  256,  32,  32)
        e4 = self.enc4(self.pool(e3))       # (N,  512,  16,  16)
        b = self.bottleneck(self.pool(e4))  # (N, 1024,   8,   8)
        d4 = self.up4(b)                    # (N,  512,  16,  16)
        d4 = self.join(d4, e4)              # (N, 1024,  16,  16)
        d4 = self.dec4(d4)                  # (N,  512,  16,  16)
        d3 = self.up3(d4)                   # (N,  256,  32,  32)
        d3 = self.join(d3, e3)              # (N,  512,  32,  32)
        d3 = self.dec3(d3)                  # (N,  256,  32,  32)
        d2 = self.up2(d3)                   # (N,  128,  64,  64)
        d2 = self.join(d2, e2)              # (N,  256,  64,  64)
        d2 = self.dec2(d2)                  # (N,  128,  64,  64)
        d1 = self.up1(d2)                   # (N,   64, 128, 128)
        d1 = self.join(d1, e1)              # (N,  128, 128, 128)
        d1 = self.dec1(d1)                  # (N,   64, 128, 128)
        return self.final(d1)               # (N,    3, 128, 128)

# ------------------------------------------- losses and scores ------------------------------------
def one_hot(target, classes):
    """Class numbers (N, H, W) to masks (N, classes, H, W) of 0.0 and 1.0; one class is a mask."""
    return (F.one_hot(target, classes).movedim(-1, 1) if classes > 1 else target[:, None]).float()

def soft_dice(logits, target):
    """Dice of each class, 2 |P and T| / (|P| + |T|) of predicted and true pixels: (C,), 0 to 1.
    Soft: a pixel counts with its probability, which has a gradient."""
    p = logits.softmax(dim=1) if logits.shape[1] > 1 else logits.sigmoid()
    t = one_hot(target, logits.shape[1])
    return (2 * (p * t).sum((0, 2, 3)) + 1) / ((p + t).sum((0, 2, 3)) + 1)  # + 1 pixel: never 0 / 0

LOSSES = {  # (logits (N, C, H, W), target (N, H, W) of 0 to C - 1, 0 or 1 if C is 1) -> scalar
    "ce": F.cross_entropy,  # the mean over pixels: large classes, such as background, weigh most
    "weighted-ce": lambda z, t: F.cross_entropy(  # a class weighs 1 / its pixels: all weigh alike
        z, t, weight=1 / one_hot(t, z.shape[1]).sum((0, 2, 3)).clamp(min=1)),
    "bce": lambda z, t: F.binary_cross_entropy_with_logits(z, one_hot(t, z.shape[1])),
    "dice": lambda z, t: 1 - soft_dice(z, t).mean(),  # the mean over classes: all weigh the same
    "iou": lambda z, t: 1 - ((d := soft_dice(z, t)) / (2 - d)).mean(),  # IoU = Dice / (2 - Dice)
    "ce+dice": lambda z, t: F.cross_entropy(z, t) + 1 - soft_dice(z, t).mean(),
}

def scores(confusion):
    """Scores of a confusion matrix (C, C), pixels of true class (row) and predicted class (column).
    IoU: intersection / union. A class neither true nor predicted is nan, left out of the means."""
    hits, areas = confusion.diag(), confusion.sum(dim=0) + confusion.sum(dim=1)  # predicted + true
    iou, dice = hits / (areas - hits), 2 * hits / areas
    return {"mIoU": iou.nanmean().item(), "Dice": dice.nanmean().item(),
            "accuracy": (hits.sum() / confusion.sum()).item(), "IoU": iou.tolist()}

def pick_precision(device):
    """The arithmetic: 16 bits where faster; bf16 first, since fp16 overflows beyond 65504."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "fp32"

def segment(net, photos, precision="auto"):
    """uint8 photos (N, 3, H, W) to float32 logits (N, C, H, W), on the device of the network."""
    device = next(net.parameters()).device
    photos = photos.to(device, non_blocking=True)  # as bytes, a quarter of the traffic of floats
    x = photos.to(memory_format=torch.channels_last).float() / 255  # the layout of fast kernels
    precision = pick_precision(device) if precision == "auto" else precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(device.type, dtype, enabled=precision != "fp32"):  # weights stay float32
        return net(x).float()

@torch.no_grad()
def evaluate(net, dataset, loss, precision="auto"):
    """The mean loss over a dataset, and the scores of one confusion matrix of all its pixels."""
    net.eval()  # BatchNorm takes its running averages, not the batch's; dropout is off
    total, confusion, n = 0.0, 0, len(CLASSES)
    for photos, masks in DataLoader(dataset, batch_size=4):  # fits into memory where training did
        logits = segment(net, photos, precision)
        target = masks.to(logits.device).long()
        total += LOSSES[loss](logits, target).item() * len(photos)
        pairs = n * target + logits.argmax(dim=1)  # (true, predicted) as one number
        confusion += pairs.flatten().bincount(minlength=n * n).view(n, n).cpu()
    return {"val loss": total / len(dataset), **scores(confusion)}

# ------------------------------------------- training ---------------------------------------------
def load_checkpoint(path, device):
    """What `train` saved, a dict, and its network. Raises ValueError, naming the file."""
    keys = "model", "config", "size", "options", "history", "optimizer", "schedule", "scaler"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file
        state = {key: state[key] for key in keys}
        net = UNet(**state["config"])
        net.load_state_dict(state["model"])
    except Exception as error:  # the file is missing, truncated or of another program
        raise ValueError(f"{path} is no checkpoint of unet.py ({type(error).__name__})") from error
    if net.final.out_channels != len(CLASSES):
        raise ValueError(f"{path} has {net.final.out_channels} classes, not {len(CLASSES)}")
    return state, net.to(device, memory_format=torch.channels_last)

def save_checkpoint(state, path):
    """Write state beside path, then move it there: a crash never leaves half a checkpoint."""
    try:
        torch.save(state, temporary := Path(f"{path}.tmp"))
    except RuntimeError as error:  # PyTorch's way to report a full disk
        raise OSError(f"{temporary} could not be written ({error}); is the disk full?") from error
    if len(state["history"]) == 1 and path.exists():  # training has begun anew
        path.replace(f"{path}.bak")
        print(f"the old {path} is kept as {path}.bak")
    temporary.replace(path)

def train_epoch(model, batches, args, optimizer, schedule, scaler, title):
    """One pass over the training photos: the mean loss, and images a second."""
    model.train()
    total, seen, start = 0.0, 0, time.perf_counter()
    for step, (photos, masks) in enumerate(batches, start=1):
        logits = segment(model, photos, args.precision)
        loss = LOSSES[args.loss](logits, masks.to(logits.device, non_blocking=True).long())
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # scaled only in fp16, where small gradients would become 0
        scaler.step(optimizer)  # unscales first; no step if a gradient is inf or nan
        scaler.update()
        schedule.step()
        total, seen = total + loss.detach(), seen + len(photos)
        spent = time.perf_counter() - start
        if sys.stdout.isatty() and step % (1 + len(batches) // 100) == 0:
            left = spent / step * (len(batches) - step)
            print(f"{title}  step {step}/{len(batches)}  loss {total.item() / step:.3f}  "
                  f"{seen / spent:.1f} images/s  {left:.0f} s left ", end="\r", flush=True)
    return total.item() / step, seen / (time.perf_counter() - start)

def join_workers(args):
    """Under torchrun, the number of this process and how many there are; without it, 0 and 1."""
    if not torch.distributed.is_torchelastic_launched():
        return 0, 1
    if args.device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # its number on this machine
    torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    if torch.distributed.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # the first worker alone prints
    if os.environ["LOCAL_RANK"] == "0":
        open_pairs(args.data, "trainval")  # one worker a machine downloads, the others wait
    torch.distributed.barrier()
    return torch.distributed.get_rank(), torch.distributed.get_world_size()

def train(args):
    """train a network, with a checkpoint after every epoch"""
    rank, world = join_workers(args)
    args.precision = pick_precision(args.device) if args.precision == "auto" else args.precision
    options = {name: value for name, value in vars(args).items()  # what --resume must find again
               if name not in ("run", "device", "checkpoint", "resume")}
    config = dict(in_channels=3, out_classes=len(CLASSES), base=args.base, skip=args.skip,
                  norm=args.norm == "batch", dropout=args.dropout)
    state = {"config": config, "options": options, "size": args.size, "history": []}
    torch.manual_seed(args.seed)
    net = UNet(**config).to(args.device, memory_format=torch.channels_last)
    if args.resume:
        state, net = load_checkpoint(args.checkpoint, args.device)
        other = {key: value for key, value in state["options"].items() if options.get(key) != value}
        if other:  # --epochs counts too: at the last of them the learning rate is almost 0
            raise ValueError(f"--resume: {args.checkpoint} was trained with {other}; give the same")
        if len(state["history"]) == args.epochs:
            raise ValueError(f"{args.checkpoint} has all {args.epochs} epochs, nothing is left")
    train_set, val_set = (PetDataset(args.data, part, args.size) for part in ("train", "val"))
    steps = min(math.ceil(len(train_set) / args.batch_size), len(train_set) // world)  # an epoch
    # AdamW averages gradients; in few epochs, forgetting sooner than (0.9, 0.999) learns faster.
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, betas=(0.5, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # up to --lr, then down to almost 0
        optimizer, args.lr, args.epochs * steps, anneal_strategy="linear", cycle_momentum=False)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "fp16")
    parts = {"model": net, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if args.resume:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net  # averages gradients
    for epoch in range(len(state["history"]) + 1, args.epochs + 1):
        torch.manual_seed(10_000 * args.seed + epoch)  # so --resume has the same order and flips
        order = torch.randperm(len(train_set)).tensor_split(steps)  # equal parts, no small last one
        share = [batch.tensor_split(world)[rank].tolist() for batch in order]  # of this worker
        batches = DataLoader(train_set, batch_sampler=share, pin_memory=args.device.type == "cuda")
        title = f"epoch {epoch:2}/{args.epochs}"
        loss, speed = train_epoch(model, batches, args, optimizer, schedule, scaler, title)
        if rank > 0:
            continue  # the first worker alone validates and saves
        val = evaluate(net, val_set, args.loss, args.precision)
        if not math.isfinite(loss + val["val loss"]):
            raise ValueError("the loss is not finite: try a lower --lr or --precision fp32")
        print(f"{title}  loss {loss:.3f}  val loss {val['val loss']:.3f}  mIoU {val['mIoU']:.3f}  "
              f"Dice {val['Dice']:.3f}  {speed * world:.1f} images/s", flush=True)
        state["history"].append({"train loss": loss, **val})
        state.update({name: part.state_dict() for name, part in parts.items()})
        save_checkpoint(state, args.checkpoint)

# ------------------------------------------- using it ---------------------------------------------
def test(args):
    """score a checkpoint on the official test photos"""
    state, net = load_checkpoint(args.checkpoint, args.device)
    s = evaluate(net, PetDataset(args.data, "test", state["size"]), state["options"]["loss"])
    classes = "  ".join(f"{name} {iou:.3f}" for name, iou in zip(CLASSES, s["IoU"]))
    print(f"mIoU {s['mIoU']:.3f}  {classes}  Dice {s['Dice']:.3f}  acc {s['accuracy']:.3f}")

def colour(masks):
    """Masks (N, H, W) as pictures (N, 3, H, W); as brightness, 0 to 2 would all look black."""
    palette = torch.tensor(list(CLASSES.values()), dtype=torch.uint8)  # (classes, 3)
    return palette[masks.long().cpu()].movedim(-1, 1)

@torch.no_grad()
def show(args):
    """draw test photos, their truth and prediction, and the curves of the training"""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid
    state, net = load_checkpoint(args.checkpoint, args.device)
    test_set = PetDataset(args.data, "test", state["size"], count=6)
    photos, masks = next(iter(DataLoader(test_set, batch_size=6)))
    predicted = segment(net.eval(), photos).argmax(dim=1)
    rows = {"input": photos, "ground truth": colour(masks), "prediction": colour(predicted)}
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    *axes, curves = figure.subplots(len(rows) + 1)
    for axis, (name, pictures) in zip(axes, rows.items()):
        axis.imshow(make_grid(pictures, pad_value=255).movedim(0, -1))
        axis.set(xticks=[], yticks=[], ylabel=name)
    for name, rgb in CLASSES.items():  # empty plots, for the legend under the last row
        axes[-1].plot([], "s", color=[v / 255 for v in rgb], markeredgecolor="gray", label=name)
    axes[-1].legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(CLASSES), frameon=False)
    for key in ("train loss", "val loss", "mIoU"):
        values = [epoch[key] for epoch in state["history"]]
        curves.plot(range(1, len(values) + 1), values, ".-", label=key)
    curves.set_xlabel("epoch")
    curves.locator_params(axis="x", integer=True)
    curves.legend()
    figure.savefig(args.out)
    print(f"wrote {args.out}")

@torch.no_grad()
def predict(args):
    """segment any photo: the mask drawn over it, at the photo's own size"""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image
    if args.out.exists() and args.out.samefile(args.photo):
        raise ValueError(f"--out {args.out} would overwrite the photo")
    state, net = load_checkpoint(args.checkpoint, args.device)
    try:
        photo = ImageOps.exif_transpose(Image.open(args.photo))  # upright, as the camera was held
        if photo.mode.startswith("I"):  # 16 bits a pixel, which convert alone would clip to white
            photo = photo.convert("I").point(lambda value: value / 256).convert("L")
        photo = photo.convert("RGB")
    except Exception as error:
        raise ValueError(f"{args.photo} cannot be read as a photo ({error})") from error
    x = pil_to_tensor(photo.resize((state["size"], state["size"]), Image.Resampling.BILINEAR))
    logits = segment(net.eval(), x.unsqueeze(0))
    # Logits are resized, not labels: logits change smoothly, so edges do; labels make blocks.
    height_width = photo.size[::-1]
    mask = F.interpolate(logits, size=height_width, mode="bilinear").argmax(dim=1)
    Image.blend(photo, to_pil_image(colour(mask)[0]), 0.5).save(args.out)
    print(f"wrote {args.out}")

def shapes(args):
    """print the shapes of one forward pass"""
    with torch.device("meta"):  # meta tensors have shapes but no values
        net, x = UNet(base=args.base).eval(), torch.empty(1, 3, args.size, args.size)
    for name, module in net.named_children():
        module.register_forward_hook(lambda _, inputs, output, name=name: print(
            f"{name:<10}  {str(tuple(inputs[0].shape)):<20} -> {tuple(output.shape)}"))
    net(x)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters")

# ------------------------------------------- command line -----------------------------------------
def checked(convert, rule, allowed=lambda value: True):
    """For add_argument: a type that converts the text or tells the rule that it breaks."""
    def parse(text):
        with suppress(Exception):
            if allowed(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")
    return {"type": parse}

def number(kind, low, high, step=None):
    divisible = f" divisible by {step}" if step else ""
    rule = f"a number ({kind.__name__}) from {low} to {high}{divisible}"
    return checked(kind, rule, lambda x: low <= x <= high and not (step and x % step))

def find_device(name):
    if name == "auto":  # asked to check, since PyTorch names CUDA even where there is no driver
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.zeros(1, device=name).item()  # raises where the device does not exist or does not work
    return torch.device(name)

DEVICE = checked(find_device, "a device that works here")
FILE = checked(Path, "a file in an existing folder", lambda p: p.parent.is_dir() and not p.is_dir())
PICTURE = checked(Path, "a .png, .jpg or .webp file in an existing folder",
                  lambda p: p.parent.is_dir() and p.suffix.lower() in (".png", ".jpg", ".webp"))
OPTIONS = (  # name, the commands that have it, default, rule, help
    ("photo", "predict", None, {"type": Path}, "any image file"),
    ("--data", "train test show", "data", {}, "dataset folder, fetched if missing; toy: drawings"),
    ("--epochs", "train", 5, number(int, 1, 9999), "passes over the training photos"),
    ("--batch-size", "train", 8, number(int, 1, 1024), "photos in one step of all workers"),
    ("--size", "train shapes", 128, number(int, 32, 2048, 16), "photos are resized to size x size"),
    ("--base", "train shapes", 64, number(int, 1, 256), "channels of the first level"),
    ("--lr", "train", 4e-3, number(float, 1e-6, 1), "highest learning rate of the one cycle"),
    ("--loss", "train", "ce", {"choices": LOSSES}, "what training minimises"),
    ("--skip", "train", "concat", {"choices": ("concat", "add", "none")}, "how skips are joined"),
    ("--norm", "train", "batch", {"choices": ("batch", "none")}, "what follows each convolution"),
    ("--dropout", "train", 0.0, number(float, 0, 0.9), "probability at the end of the encoder"),
    ("--precision", "train", "auto", {"choices": ("auto", "fp32", "bf16", "fp16")}, "arithmetic"),
    ("--seed", "train", 0, number(int, 0, 2**31), "of the weights, the order and the flips"),
    ("--checkpoint", "train test show predict", "unet.pt", FILE, "the trained network"),
    ("--resume", "train", False, {"action": "store_true"}, "go on after the last finished epoch"),
    ("--out", "show", "unet.png", PICTURE, "the picture to write"),
    ("--out", "predict", "prediction.png", PICTURE, "the picture to write"),
    ("--device", "train test show predict", "auto", DEVICE, "cpu, cuda, cuda:1, mps ..."),
)

def main(argv=None):
    parser = argparse.ArgumentParser(
        "unet.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run in (train, test, show, predict, shapes):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        command.set_defaults(run=run)
        for name, users, default, rule, text in OPTIONS:
            if run.__name__ in users.split():
                command.add_argument(name, default=default, help=text, **rule)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.exit("\nstopped; train --resume goes on after the last finished epoch, if there is one")
    except (OSError, ValueError, torch.OutOfMemoryError) as error:  # others are bugs: a traceback
        sys.exit(f"unet.py: {' '.join(str(error).split())}")

if __name__ == "__main__":
    main()
