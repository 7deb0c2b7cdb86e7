"""The recipes of hw1.py, the course's MANN."""

from .ledger import Case

PULSE = "--train_steps 12 --eval_freq 6 --num_val_tasks 200 --num_test_tasks 200"

LONG = "--jitter 0.1 --train_steps 12000 --eval_freq 500"
COURSE = "--head recurrent --logit_scale 1 --forget_bias 0 --no-rotations --schedule constant --clip 0"

CASES = [
    *[Case(f"K{K}N{N}", f"--num_shot {K} --num_classes {N}", LONG, "--jitter 0.1 --train_steps 50000 --eval_freq 1000",
           seeds=3, minutes=minutes)
      for K, N, minutes in ((1, 2, 3), (2, 2, 4), (1, 3, 4), (1, 4, 5))],
    # The first command of the README; its first seed is timed, on an idle machine.
    Case("default", "--num_shot 1 --num_classes 2", seeds=3, minutes=5, beyond=True),
    Case("conv_K1N5",
         "--num_shot 1 --num_classes 5 --encoder strided --shared_classes 60 --hidden_dim 256 --learning_rate 2e-3",
         "--train_steps 8000 --eval_freq 500", "--train_steps 40000 --eval_freq 1000", seeds=3, minutes=6),
    Case("memorisation", "--num_shot 1 --num_classes 5 --fixed_labels --no-rotations --head recurrent --forget_bias 0",
         "--train_steps 5000 --eval_freq 250", "--train_steps 25000"),
    *[Case(f"K1N3_{name}", f"--num_shot 1 --num_classes 3 {COURSE} {flags}", "--train_steps 5000",
           "--train_steps 25000", minutes=2)
      for name, flags in (("rate_1e-1", "--learning_rate 1e-1"), ("rate_1e-3", "--learning_rate 1e-3"),
                          ("rate_1e-5", "--learning_rate 1e-5"), ("memory_8", "--learning_rate 1e-3 --hidden_dim 8"),
                          ("memory_256", "--learning_rate 1e-3 --hidden_dim 256"),
                          ("gru", "--learning_rate 1e-3 --recurrent gru"),
                          ("3_layers", "--learning_rate 1e-3 --num_layers 3"))],
]  # fmt: skip
