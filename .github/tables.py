"""Repeats what README.md says of unet.py. The README is the only list of edits.

    python .github/tables.py data          train and test every row of its two tables, draw edits.png
    python .github/tables.py data skips    only the rows with this word in their name
    python .github/tables.py --check       does all code of the README fit unet.py, and work?

`data` is the folder of the Oxford-IIIT Pets, as `python unet.py train` downloads them. The rows use
the first six breeds: 600 images for training and validation, 298 for the test. Set OMP_NUM_THREADS=1
to run two of these commands at a time."""
import contextlib, io, os, re, shutil, subprocess, sys, tempfile, types
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "unet.py").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BREEDS = {"trainval": "123456", "test": "126"}  # their numbers in the lists of the dataset

def block(words):
    """The fenced block of the README that has these words."""
    return next(code for code in re.findall(r"```\w*\n(.*?)```", README, re.S) if words in code)

def edits(words):
    """A block of edits, as {name: [(old, new), ...]}."""
    found = {}
    for line in block(words).splitlines():
        if line.startswith(" "):
            found[name].append(tuple(line.strip().split(" → ")))
        else:
            name = line
            found[name] = []
    return found

PARTS, MISTAKES = edits("no skips\n"), edits("gradients not cleared\n")

def edited(pairs):
    """unet.py as a module, with every occurrence of each old code replaced by the new one."""
    page = PAGE
    for old, new in pairs:
        if old not in page:
            sys.exit(f"not in unet.py: {old}")
        page = page.replace(old, new)
    if "loss_fn = dice_loss" in page:
        page = page.replace("loss_fn = dice_loss", block("def dice_loss") + "\nloss_fn = dice_loss")
    unet = types.ModuleType("unet")
    exec(compile(page, "unet.py", "exec"), vars(unet))
    return unet

def shell(unet, words):
    """Run a command as a shell would."""
    sys.argv = ["unet.py", *words.split()]
    unet.main()

# -------- measure --------
PART_OPTIONS = "--data six --epochs 10 --base 16"

def select(data, folder):
    """Copy the breeds of BREEDS into a new folder, in the order of their names."""
    old, new = Path(data, "oxford-iiit-pet"), Path(folder, "oxford-iiit-pet")
    (new / "images").mkdir(parents=True)
    (new / "annotations/trimaps").mkdir(parents=True)
    for split, breeds in BREEDS.items():
        lines = (old / f"annotations/{split}.txt").read_text().splitlines()
        chosen = sorted((line for line in lines if line.split()[1] in breeds), key=str.lower)
        (new / f"annotations/{split}.txt").write_text("\n".join(chosen) + "\n")
        for line in chosen:
            name = line.split()[0]
            shutil.copy(old / f"images/{name}.jpg", new / "images")
            shutil.copy(old / f"annotations/trimaps/{name}.png", new / "annotations/trimaps")

def measure(data, word):
    select(data, "six")
    for rows, options in ((PARTS, PART_OPTIONS), (MISTAKES, "--data toy --base 16")):
        for name in ("unchanged", *rows):
            for seed in range(3):
                if word in name:
                    measure_row(name, rows.get(name, []), f"{options} --seed {seed}")

def checkpoint_of(name, options):
    return f"{name}{options}.pt".replace(" ", "")

def measure_row(name, pairs, options):
    print(f"\n{name}: {options}", flush=True)
    checkpoint = checkpoint_of(name, options)
    shell(edited(pairs), f"train {options} --checkpoint {checkpoint}")
    shell(edited(pairs), f"test --checkpoint {checkpoint}")

def draw():
    """edits.png: images, masks, and the predictions of three rows with seed 0."""
    unet = edited([])
    pairs = unet.open_pairs("six", "test")
    six = unet.PetDataset([pairs[i * len(pairs) // 6] for i in range(6)], 128)
    images, masks = next(iter(unet.DataLoader(six, 6)))
    rows = {"image": images, "ground truth": unet.COLOURS[masks].movedim(-1, 1)}
    for name in ("unchanged", "no skips", "three levels fewer"):
        saved, net = edited(PARTS.get(name, [])).load(
            checkpoint_of(name, f"{PART_OPTIONS} --seed 0"))
        with torch.no_grad():
            predictions = net(images.to(unet.DEVICE)).argmax(dim=1).cpu()
        rows[name] = unet.COLOURS[predictions].movedim(-1, 1)

    figure = unet.Figure(figsize=(9, 9), layout="constrained")
    for axis, name in zip(figure.subplots(len(rows)), rows):
        axis.imshow(unet.utils.make_grid(rows[name], nrow=6).movedim(0, -1).numpy())
        axis.set(title=name, xticks=[], yticks=[])
    figure.savefig(ROOT / ".github/edits.png")

# -------- check --------
TINY = "--epochs 2 --batch-size 60 --size 32 --base 2"

def outcome(pairs):
    """All that a tiny run with these edits can tell: the weights and the losses, or the error."""
    try:
        shell(edited(pairs), f"train --data toy {TINY}")
    except IndexError as error:  # labels that count from 1
        return repr(error)
    saved = torch.load("unet.pt")
    return str(saved["losses"]) + str([value.tolist() for value in saved["model"].values()])

def check_edits():
    unchanged = outcome([])
    for name, pairs in {**PARTS, **MISTAKES}.items():
        if outcome(pairs) == unchanged:
            sys.exit(f"makes no difference: {name}")

def check_mask():
    unet = edited([("0.5).save", "1).save"), ("(230, 159, 0)", "(255, 255, 255)"),
                   ("(0, 90, 150)", "(0, 0, 0)"), ("(240, 240, 240)", "(0, 0, 0)")])
    unet.draw_toy("0")[0].save("cat.jpg")
    shell(unet, "predict cat.jpg")
    colours = {colour for count, colour in Image.open("cat-overlay.png").getcolors(10**6)}
    if not colours <= {(0, 0, 0), (255, 255, 255)}:
        sys.exit("predict writes no black-and-white mask")

def check_own_images(folder, words, value):
    """Train on a folder of masks. `value` turns a label of a trimap into a value of such a mask."""
    for part in ("images", "masks"):
        Path(folder, part).mkdir(parents=True)
    original = edited([])
    for k in range(10):
        image, trimap = original.draw_toy(str(k))
        image.save(f"{folder}/images/{k}.jpg")
        trimap.point(value).save(f"{folder}/masks/{k}_mask.png")

    code = block("class Pairs")
    code = code[:code.index("def to_trimap")] + block(words)[block(words).index("def to_trimap"):]
    open_pairs = PAGE[PAGE.index("def open_pairs"):PAGE.index("class PetDataset")]
    pairs = [(open_pairs, code + "\n")]
    if value(3) != 2:  # not class numbers, which keep the classes of the pets
        pairs.append((re.search("CLASSES = .*", PAGE)[0], block("CLASSES = {").rstrip()))
    unet = edited(pairs)
    shell(unet, f"train --data {folder} {TINY}")
    shell(unet, "test")

    image, mask = unet.PetDataset(unet.open_pairs(folder, "test"), 192)[0]
    wanted = original.PetDataset([original.draw_toy("4")], 192)[0][1]  # 4 and 9 are for the test
    if value(3) != 2:
        wanted = (wanted == 1).long()  # pet and border are white
    if not torch.equal(mask, wanted):
        sys.exit(f"wrong masks: {folder}")

def check_several():
    """Two workers train one network, and unet.py can load it."""
    script = block("init_process_group").replace('"data", 5, 8, 128, 64', '"toy", 1, 8, 32, 2')
    Path("several.py").write_text(script)
    command = "-m torch.distributed.run --standalone --nproc_per_node=2 several.py".split()
    settings = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=os.environ | settings,
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-5000:])
    shell(edited([]), "test")

def check_select():
    """Of eight breeds with two photos each, six train, three are tested, in the order of names."""
    pets = Path("eight/oxford-iiit-pet")
    for part in ("images", "annotations/trimaps"):
        (pets / part).mkdir(parents=True)
    names = [f"{breed}_{k} {number} 1 1"
             for number, breed in enumerate("AbCdEfGh", 1) for k in (2, 1)]
    for split in BREEDS:
        (pets / f"annotations/{split}.txt").write_text("# a comment\n" + "\n".join(names))
    for name in names:
        (pets / f"images/{name.split()[0]}.jpg").touch()
        (pets / f"annotations/trimaps/{name.split()[0]}.png").touch()
    select("eight", "chosen")
    for split, wanted in (("trainval", "A_1 A_2 b_1 b_2 C_1 C_2 d_1 d_2 E_1 E_2 f_1 f_2"),
                          ("test", "A_1 A_2 b_1 b_2 f_1 f_2")):
        lines = Path(f"chosen/oxford-iiit-pet/annotations/{split}.txt").read_text().splitlines()
        if [line.split()[0] for line in lines] != wanted.split():
            sys.exit(f"select chose {lines}")

def check():
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        check_edits()
        check_mask()
        check_own_images("white", "White becomes", lambda label: 0 if label == 2 else 255)
        check_own_images("numbers", "(mask)\n    if len(numbers", lambda label: label - 1)
        check_own_images("objects", "(values != 0)", lambda label: 0 if label == 2 else label)
        check_several()
        check_select()
    print(f"{len(PARTS) + len(MISTAKES)} edits and all other code of README.md fit unet.py")

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(arguments[0]).resolve()
        os.chdir(folder)
        if arguments[0] == "--check":
            check()
        else:
            measure(data, " ".join(arguments[1:]))
            if len(arguments) == 1:
                draw()
        os.chdir(ROOT)
