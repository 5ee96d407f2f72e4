"""Repeats what README.md says of unet.py. The README is the only list of edits.

    python .github/tables.py data        train and test every row of its tables, draw edits.png
    python .github/tables.py data skips  only the rows with this word in their name
    python .github/tables.py --check     does all code of the README fit unet.py, and work?

`data` is the folder of the Oxford-IIIT Pets, as `python unet.py train` downloads them."""
import contextlib, itertools, os, re, subprocess, sys, tempfile, types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "unet.py").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BREEDS = {"trainval": "123456", "test": "126"}  # 600 photos to train and validate, 298 to test
TINY = "--epochs 2 --batch-size 60 --size 32 --base 2"

def block(words):
    """The fenced block of the README that has these words."""
    return next(code for code in re.findall(r"```\w*\n(.*?)```", README, re.S) if words in code)

def edits(words):
    """A block of edits, as {name: [[old, new], ...]}."""
    found = {}
    for name, lines in re.findall(r"(\S.*)\n((?: .*\n)+)", block(words)):
        found[name] = [line.strip().split(" → ") for line in lines.splitlines()]
    return found

PARTS, MISTAKES = edits("no skips\n"), edits("gradients not cleared\n")

def edited(pairs):
    """unet.py as a module, with every occurrence of each old code replaced by the new one."""
    page = PAGE
    for old, new in pairs:
        assert old in page, f"not in unet.py: {old}"
        page = page.replace(old, new)
    page = page.replace("loss_fn = dice_loss", block("def dice_loss") + "\nloss_fn = dice_loss")
    unet = types.ModuleType("unet")
    exec(compile(page, "unet.py", "exec"), vars(unet))
    return unet

def shell(unet, words):
    """Run a command as a shell would."""
    sys.argv = ["unet.py", *words.split()]
    unet.main()

# -------- measure --------
def select(data, folder):
    """A folder with the photos of BREEDS alone, in the order of their names."""
    old, new = Path(data, "oxford-iiit-pet"), Path(folder, "oxford-iiit-pet")
    (new / "annotations").mkdir(parents=True)
    for part in ("images", "annotations/trimaps"):
        (new / part).symlink_to(old / part)
    for split, breeds in BREEDS.items():
        lines = (old / f"annotations/{split}.txt").read_text().splitlines()
        chosen = sorted((line for line in lines if line.split()[1] in breeds), key=str.lower)
        (new / f"annotations/{split}.txt").write_text("\n".join(chosen) + "\n")

def measure(data, word):
    select(data, "six")
    for rows, options in ((PARTS, "--data six --epochs 10"), (MISTAKES, "--data toy")):
        names = [name for name in ("unchanged", *rows) if word in name]
        for name, seed in itertools.product(names, range(3)):
            print(f"\n{name}, seed {seed}", flush=True)
            unet, checkpoint = edited(rows.get(name, [])), f"{name}{seed}.pt".replace(" ", "")
            shell(unet, f"train {options} --base 16 --seed {seed} --checkpoint {checkpoint}")
            shell(unet, f"test --checkpoint {checkpoint}")
        if rows is PARTS and not word:
            draw()

def draw():
    """edits.png: images, masks, and the predictions of three rows with seed 0."""
    unet = edited([])
    pairs = unet.open_pairs("six", "test")
    six = unet.PetDataset([pairs[i * len(pairs) // 6] for i in range(6)], 128)
    images, masks = next(iter(unet.DataLoader(six, 6)))
    rows = {"image": images, "ground truth": unet.COLOURS[masks].movedim(-1, 1)}
    for name in ("unchanged", "no skips", "three levels fewer"):
        saved, net = edited(PARTS.get(name, [])).load(f"{name}0.pt".replace(" ", ""))
        predictions = net(images.to(unet.DEVICE)).argmax(dim=1).cpu()
        rows[name] = unet.COLOURS[predictions].movedim(-1, 1)

    figure = unet.Figure(figsize=(9, 9), layout="constrained")
    for axis, name in zip(figure.subplots(len(rows)), rows):
        axis.imshow(unet.utils.make_grid(rows[name], nrow=6).movedim(0, -1).numpy())
        axis.set(title=name, xticks=[], yticks=[])
    figure.savefig(ROOT / ".github/edits.png")

# -------- check --------
def outcome(pairs):
    """The losses and the weights of a tiny run with these edits."""
    shell(edited(pairs), f"train --data toy {TINY}")
    saved = torch.load("unet.pt")
    return str(saved["losses"]), [value.tolist() for value in saved["model"].values()]

def check_own_images(folder, value, code, classes):
    """Train on toys with masks of another kind. `value` turns a label into a value of the mask."""
    toys = [edited([]).draw_toy(str(k)) for k in range(10)]
    for part in ("images", "masks"):
        Path(folder, part).mkdir(parents=True)
    for k, (image, trimap) in enumerate(toys):
        image.save(f"{folder}/images/{k}.jpg")
        trimap.point(value).save(f"{folder}/masks/{k}.png")

    last_line = re.search(r"return datasets.*", PAGE)[0]
    unet = edited([(last_line, "return OwnPairs(data, split)"), *classes,
                   ("def open_pairs", code + "\ndef open_pairs")])
    shell(unet, f"train --data {folder} {TINY}")
    shell(unet, "test")

    image, trimap = unet.open_pairs(folder, "test")[0]
    assert trimap.point(value).tobytes() == toys[4][1].point(value).tobytes()  # the fifth toy

def check_several_gpus():
    """Two workers train one network, and unet.py can load it."""
    script = block("init_process_group").replace('"data", 5, 8, 128, 64', '"toy", 1, 8, 32, 2')
    Path("several.py").write_text(script)
    command = "-m torch.distributed.run --standalone --nproc_per_node=2 several.py".split()
    settings = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=os.environ | settings,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shell(edited([]), "show")

def check():
    unchanged = outcome([])
    for name, pairs in {**PARTS, **MISTAKES}.items():
        assert outcome(pairs) != unchanged, f"makes no difference: {name}"

    code = block("class OwnPairs")
    classes = (re.search("CLASSES = .*", PAGE)[0], block("CLASSES = {").strip())
    check_own_images("white", lambda label: 0 if label == 2 else 255, code, [classes])
    lines = code.splitlines()[:-4] + [" " * 8 + re.search(r"`(return image.*)`", README)[1]]
    check_own_images("numbers", lambda label: label - 1, "\n".join(lines) + "\n", [])
    check_several_gpus()

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    data, word = Path(sys.argv[1]).resolve(), " ".join(sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if data.name == "--check":
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
                check()
            print(f"{len(PARTS) + len(MISTAKES)} edits and all other code of README.md fit unet.py")
        else:
            measure(data, word)
        os.chdir(ROOT)
