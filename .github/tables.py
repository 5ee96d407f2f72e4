"""Train and score the rows of README's first two tables again:

    python .github/tables.py DATA [TEXT] [SEED ...]

DATA is the folder of pets6; TEXT, some text of the rows wanted, all by default; SEED, 0 by default. README is the
only list of rows. A row takes about two minutes (OMP_NUM_THREADS=1, and two at a time, is the fastest on two cores)."""
import re, shlex, sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from test_unet import PAGE, README, edits_of

data, text, seeds = sys.argv[1], (sys.argv[2:3] or [""])[0], sys.argv[3:] or ["0"]
experiments, mistakes = README.split("## What each classic mistake looks like")
mistakes = mistakes.split("\n## ")[0]

for part, options in ((experiments, f"--data {data} --base 16 --epochs 10"), (mistakes, "--data toy --base 16 --epochs 5")):
    for row in re.findall(r"^\| .*(?:→|`--|as it is).*$", part, re.M):
        if text not in row:
            continue
        for seed in seeds:
            source = PAGE
            for old, new, _ in edits_of(row):
                source = source.replace(old, new)
            page = {"__name__": "page"}
            exec(compile(source, "unet.py", "exec"), page)
            train = f"train {options} --seed {seed} " + " ".join(re.findall(r"`(--[^`]+)`", row))
            test = "test " + " ".join(options.split()[:2])  # --data alone
            print(row, "seed", seed, flush=True)
            try:
                for words in (train, test):
                    sys.argv = ["unet.py", *shlex.split(words), "--checkpoint", "edited.pt"]
                    page["main"]()
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
