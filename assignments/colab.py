# %% [markdown]
# # TITLE
#
# Clones your repository, installs what it needs, runs the public tests, trains, and opens TensorBoard.
# Your answers belong into the `.py` files (on the left, in the folder `homework`); run a cell again after a change.

# %%
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = os.environ.get("REPOSITORY", "https://github.com/YOUR_COURSE/YOUR_REPOSITORY")
if not Path("handout.md").exists():  # not there yet
    subprocess.run(["git", "clone", REPOSITORY, "homework"], check=True)
    os.chdir("homework")
print("working in", Path.cwd())

# %%
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"], check=True)

# %%
# Which questions are done? The public tests say so.
subprocess.run([sys.executable, "-m", "pytest", "--tb=line"])

# %%
# A run of seconds without any data; the commands of the handout make its figures.
command = "SCRIPT_AND_FLAGS"
subprocess.run([sys.executable, *command.split()])

# %%
from tensorboard import notebook  # noqa: E402 (a cell of its own)

notebook.start("--logdir runs")
