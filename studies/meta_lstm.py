"""The recipes of meta_lstm.py."""

import shlex

from .ledger import TEST, Case, on_mnist

PULSE = "--train_steps 4 --eval_freq 2 --num_val_tasks 4 --num_test_tasks 4 --meta_batch_size 2 --inner_epochs 2"

CASES = [
    Case("5way1shot", "--num_classes 5 --num_shot 1", "", "--train_steps 30000", seeds=3, minutes=30, beyond=True),
    Case("5way5shot", "--num_classes 5 --num_shot 5", "--train_steps 3000 --eval_freq 300", "--train_steps 30000",
         seeds=3, minutes=25, beyond=True),
    # 10 shots leave 10 of a character's 20 images for queries, where the preset wants 15
    Case("10way10shot", "--preset 10way10shot --train_query 5 --num_query 5",
         "--train_steps 250 --eval_freq 125 --num_val_tasks 40", seeds=3, minutes=15, beyond=True),
    Case("10way10shot_reset", f"{TEST} --reset_theta0", minutes=15, beyond=True, start="meta_lstm/10way10shot"),
    *[Case(f"5way1shot_{name}", recipe, "--train_steps 600 --eval_freq 200", "--train_steps 6000", minutes=minutes)
      for name, recipe, minutes in (("short", "", 3), ("pool", "--fixed_pool 6", 3),
                                    ("second_order", "--second_order --trained_share 1", 11))],
    *on_mnist("meta_lstm/10way10shot", seeds=1),
    *on_mnist("meta_lstm/10way10shot", " --reset_theta0", "reset_", seeds=1),
]  # fmt: skip


def with_images(folder: str) -> list[Case]:
    """The cases that need miniImageNet, whose images nobody may hand on: those of --mini_imagenet FOLDER."""
    images = f"--image_size 84 --dataset folder --data_folder {shlex.quote(folder)}"
    return [
        Case(f"miniImagenet_{preset}", f"--preset {preset} {images}", "--train_steps 500 --eval_freq 100", minutes=60)
        for preset in ("5way1shot", "5way5shot", "10way10shot", "10way20shot")
    ]
