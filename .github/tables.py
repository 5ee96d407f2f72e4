"""The code of the README, applied to unet.py. README.md is its only list of edits.

    python .github/tables.py --check          does every edit fit, and change what is learned?
    python .github/tables.py DATA [WORDS]     train and test the rows again that have these WORDS

DATA is the folder of the 600 images. A row takes about six minutes of a core: three seeds of two
minutes. The rows of "Classic mistakes" learn the toy data. Set OMP_NUM_THREADS=1 to run several at
a time: each has a folder of its own."""
import contextlib, io, os, re, subprocess, sys, tempfile, types
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "unet.py").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = {"data": "toy", "epochs": 2, "batch_size": 60, "size": 32, "base": 2}

def block(words):
    """The Python block of the README that has these words."""
    return next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if words in code)

def edits_of(row):
    """The edits (old, new, times) of a row. "and so on to level 1" lowers the numbers of the names."""
    name = re.compile(r"\b([a-e])(\d)\b")
    def lower(code, by):
        return name.sub(lambda found: found[1] + str(int(found[2]) - by), code)
    for old, new, twice, last in re.findall(
            r"`([^`]+)` → `([^`]+)`( twice)?(?: and so on to level (\d))?", row):
        first = min((int(digit) for _, digit in name.findall(old)), default=1)
        for by in range(first - int(last) + 1 if last else 1):
            yield lower(old, by), lower(new, by), 2 if twice else 1

def edited(edits):
    """unet.py as a module, with these edits. Each old code must be in it as often as told."""
    source = SOURCE
    for old, new, times in edits:
        if SOURCE.count(old) != times:
            sys.exit(f"in unet.py {SOURCE.count(old)} times and not {times}: {old}")
        source = source.replace(old, new)
    if "loss_fn = dice_loss" in source:
        source = source.replace("loss_fn = dice_loss", block("def dice_loss") + "\nloss_fn = dice_loss")
    unet = types.ModuleType("unet")
    exec(compile(source, "unet.py", "exec"), vars(unet))
    return unet

def outcome(unet):
    """All that a tiny training can tell: the weights and the history."""
    try:
        unet.train(**TINY)
    except IndexError as error:
        return repr(error)
    saved = torch.load("unet.pt")
    return str(saved["history"]) + str([value.tolist() for value in saved["model"].values()])

def rows(part):
    """The rows of a section of the README that have an edit, or none: "unchanged"."""
    section = README.split(f"\n## {part}")[1].split("\n## ")[0]
    found = re.findall(r"^\| .*(?:→|unchanged).*$", section, re.M)
    return list(dict.fromkeys(found))  # "unchanged" is the first row of each table

CHOICES, MISTAKES = rows("What each choice is worth"), rows("Classic mistakes")

def check_folders(masks, value):
    """Folders learns from such masks. `value` turns the label of a trimap into the value of a mask."""
    unet, folder = edited([]), Path(masks)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for k in range(10):
        image, trimap = unet.draw_pair(str(k))
        image.save(folder / f"images/{k}.jpg")
        trimap.point(value).save(folder / f"masks/{k}.png")

    script = (ROOT / ".github/folders.py").read_text()
    Path(f"folders_{masks}.py").write_text(script.replace("to_trimap = white_on_black", f"to_trimap = {masks}"))
    new_lines = block("import Folders").rstrip().replace("folders", f"folders_{masks}")
    old_lines = "    if split ==" + SOURCE.split("    if split ==")[1].split("\n\nclass")[0]
    old_classes = re.search(r"CLASSES = .*", SOURCE)[0]
    new_classes = old_classes if masks == "class_numbers" else re.search(r"CLASSES = \{.*?\}", README)[0]
    unet = edited([(old_lines, new_lines, 1), (old_classes, new_classes, 1)])
    unet.train(**TINY | {"data": str(folder), "batch_size": 4})
    unet.test()
    unet.show()

def check_mask():
    """The edit of `predict` writes a black-and-white mask."""
    edit = re.search(r"`Image.blend\S*.*?`.*?`.*?`", README, re.S)[0].replace("\n ", "")
    unet = edited(edits_of(edit))
    unet.draw_pair("0")[0].save("cat.jpg")
    unet.predict("cat.jpg")
    if Image.open("cat-overlay.png").mode not in "1L":
        sys.exit("predict writes no black-and-white mask")

def check_several():
    """Two workers train one network, and unet.py can load it."""
    script = (ROOT / ".github/several.py").read_text().replace("128, 64, 5", "32, 2, 1")
    Path("several.py").write_text(script)
    command = "-m torch.distributed.run --standalone --nproc_per_node=2 several.py toy".split()
    paths = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for attempt in range(4):  # it failed once in a fresh clone, and the cause was not seen
        done = subprocess.run([sys.executable, *command], env=os.environ | paths,
                              capture_output=True, text=True)
        if done.returncode == 0:
            break
    else:
        sys.exit(done.stderr[-3000:])
    edited([]).show()

def check():
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        unchanged = outcome(edited([]))
        for row in CHOICES + MISTAKES:
            if "→" in row and outcome(edited(edits_of(row))) == unchanged:
                sys.exit(f"makes no difference: {row}")
        check_several()
        check_mask()
        check_folders("white_on_black", lambda label: 0 if label == 2 else 255)
        check_folders("class_numbers", lambda label: label - 1)
        check_folders("objects", lambda label: 0 if label == 2 else label)
    print(f"{len(CHOICES + MISTAKES)} rows, folders.py and several.py fit unet.py")

def measure(data, words):
    for part, options in ((CHOICES, {"data": data, "epochs": 10}), (MISTAKES, {"data": "toy"})):
        for row in part:
            if words not in row:
                continue
            for seed in range(3):
                print(row.split("|")[1], f"seed {seed}", flush=True)
                unet = edited(edits_of(row))
                try:
                    unet.train(base=16, seed=seed, **options)
                    unet.test()
                except IndexError as error:
                    print(repr(error))

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    data = sys.argv[1] if sys.argv[1] == "--check" else str(Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        check() if data == "--check" else measure(data, " ".join(sys.argv[2:]))
        os.chdir(ROOT)
