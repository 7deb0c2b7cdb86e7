"""The recipes of mae.py, and of the prototypical networks that start from what it has learned."""

from .ledger import Case

PULSE = (
    "--train_steps 8 --eval_freq 4 --num_val_tasks 20 --num_test_tasks 20 --width 16 --depth 1 --decoder_width 16 "
    "--meta_batch_size 32 --views 2 --whitening_images 100"
)

TASKS = "--num_test_tasks 2000"

CASES = [
    Case("mae", "", "", "--train_steps 30000", seeds=3, minutes=60, beyond=True),
    Case("mae_1000_steps", "", *["--train_steps 1000 --eval_freq 250"] * 2, seeds=3, minutes=18, beyond=True),
    # By what is hidden, shorter: one reading of a drawing costs half of two, and teaches more slowly.
    *[Case(f"{kind}_{ratio}_masked", f"{flags}--mask_ratio 0.{ratio}", f"--train_steps {steps} --eval_freq 200",
           minutes=4, beyond=True)
      for kind, flags, steps in (("mae", "", 200), ("mae_alone", "--contrast 0 ", 600)) for ratio in (25, 50, 75, 90)],
    *[Case(f"vit_{n}_characters", f"--encoder vit --train_characters {n}", TASKS, TASKS, seeds=3, minutes=12,
           beyond=True, script="protonet.py") for n in (50, 200, 1100)],
    # A tenth of the rate: at the usual one the start is forgotten.
    *[Case(f"vit_{n}_characters_from_mae",
           f"--encoder vit --train_characters {n} --learning_rate 0.01 --train_steps 500 --eval_freq 100",
           TASKS, TASKS, seeds=3, minutes=3, beyond=True, start="mae/mae", script="protonet.py")
      for n in (50, 200, 1100)],
]  # fmt: skip
