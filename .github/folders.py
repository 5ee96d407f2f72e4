"""Your own images and masks as data for unet.py. Copy this file beside it.

The mask of images/a.jpg is masks/a.png or masks/a_mask.png, or has any other suffix that Pillow
can read. Every fifth image, in the order of the names, is for the test. Edit `for_test` if images of
one patient, slide or film must stay together."""
from pathlib import Path

from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

def white_on_black(mask):
    """White becomes label 1, for the first class, and black becomes label 2."""
    if mask.mode[0] in "IF":  # Pillow's modes with more than 8 bits
        raise ValueError(f"{mask.filename}: more than 8 bits, see `to_trimap` in folders.py")
    levels = mask.convert("L")

    # A JPEG has grey pixels at edges, but not many. A mask may be black, but not nearly black.
    grey = sum(levels.histogram()[64:192]) / (mask.width * mask.height)
    brightest = levels.getextrema()[1]
    if grey > 0.05 or 0 < brightest < 192:
        raise ValueError(f"{mask.filename}: not black and white, see `to_trimap` in folders.py")
    return levels.point(lambda value: 1 if value > 127 else 2)

def class_numbers(mask):
    """The number of a class, from 0, becomes its label, from 1."""
    if mask.mode not in ("L", "P"):
        raise ValueError(f"{mask.filename}: has colours or more than 8 bits")
    return mask.point(lambda value: value + 1)

def objects(mask):
    """Any number or colour becomes label 1, but 0 or black, the background, becomes label 2."""
    values = pil_to_tensor(mask)[:3].float().amax(dim=0)  # (H, W), without transparency
    return to_pil_image(2 - (values > 0).byte())

to_trimap = white_on_black  # or class_numbers, or objects

class Folders:
    """The pairs (RGB image, trimap) of the split "trainval" or "test"."""
    def __init__(self, folder, split):
        self.pairs = []
        files = Path(folder, "images").iterdir()
        images = [path for path in files if not path.name.startswith(".")]  # .DS_Store
        for i, image in enumerate(sorted(images)):
            masks = [path for path in Path(folder, "masks").iterdir()
                     if path.stem.removesuffix("_mask") == image.stem]
            if len(masks) != 1:
                raise ValueError(f"{image}: {len(masks)} masks of its name in {folder}/masks")
            for_test = i % 5 == 4
            if for_test == (split == "test"):
                self.pairs.append((image, masks[0]))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        image_path, mask_path = self.pairs[i]
        image = ImageOps.exif_transpose(Image.open(image_path))  # upright
        mask = ImageOps.exif_transpose(Image.open(mask_path))
        if image.mode[0] in "IF":
            raise ValueError(f"{image_path}: more than 8 bits")
        if image.size != mask.size:
            raise ValueError(f"{image_path} has {image.size} pixels, but its mask {mask.size}")

        mask.filename = mask_path  # for messages
        trimap = to_trimap(mask)
        trimap.filename = mask_path
        return image.convert("RGB"), trimap
