"""The recipes of maml.py and of MAML's relatives."""

from .ledger import Case, on_mnist

PULSE = "--train_steps 10 --warmup_steps 5 --eval_freq 5 --num_val_tasks 4 --num_test_tasks 4 --width 16"

FULL = "--train_steps 60000 --eval_freq 1000"
SCRATCH = "--warmup_steps 0 --encoder strided"  # by the inner loop from the first step
MUON = "--meta_batch_size 16 --optimizer muon --learning_rate 0.05"
PROTO = "--head proto --first_order --inner_lr 0.01"

CASES = [
    Case("fomaml", "--first_order --zero_head", "", FULL, seeds=3, minutes=7),
    Case("protomaml", PROTO, "", FULL, seeds=3, minutes=7),
    Case("maml", "", "", FULL, seeds=3, minutes=8),
    Case("anil", "--freeze_body", "", FULL, seeds=3, minutes=7),
    *[Case(f"{N}way{K}shot", f"--num_classes {N} --num_shot {K}", "--num_val_tasks 100", FULL, seeds=3,
           minutes=minutes, beyond=True)
      for N, K, minutes in ((5, 5, 10), (10, 1, 12), (20, 1, 20), (20, 5, 25))],
    Case("20way5shot_muon", "--num_classes 20 --num_shot 5 --optimizer muon --learning_rate 0.05",
         "--num_val_tasks 100 --train_steps 4200 --eval_freq 2100", FULL, seeds=3, minutes=40, beyond=True),
    # From ProtoNet's network; at 5 shots by two inner steps at half the head's usual rate, N / sqrt(64) (docs/log.md).
    *[Case(f"vinyals_{N}way{K}shot",
           f"--split vinyals --num_classes {N} --num_shot {K} --warmup_steps 0 --learning_rate 1e-3{inner}",
           f"--num_val_tasks 100 --train_steps {steps} --eval_freq {steps // 2}", FULL, seeds=3, minutes=minutes,
           beyond=True, start="protonet/vinyals")
      for N, K, steps, minutes, inner in (
          (5, 1, 200, 3, ""),
          (5, 5, 200, 8, " --inner_steps 2 --head_lr 0.31"),
          (20, 1, 100, 8, ""),
          (20, 5, 60, 15, " --inner_steps 2 --head_lr 1.25"))],
    *[Case(f"{name}_scratch", recipe, f"--train_steps {steps} --eval_freq 500", FULL, seeds=3, minutes=minutes,
           beyond=True)
      for name, steps, minutes, recipe in (
          ("maml", 6000, 50, f"{SCRATCH} {MUON}"),
          ("fomaml", 8000, 50, f"{SCRATCH} {MUON} --first_order --zero_head"),
          ("mamlpp", 3500, 50, f"{SCRATCH} --meta_batch_size 16 --learn_inner_lrs --multi_step_loss --per_step_norm "
                               "--optimizer muon --learning_rate 0.05 --inner_steps 2"),
          ("protomaml", 4000, 45, f"{PROTO} --optimizer muon --learning_rate 0.05 --warmup_steps 0 --encoder conv4"))],
    Case("plain", "--features plain", "", FULL, seeds=3, minutes=8, beyond=True),
    # The paper's own 5-way recipe, with as many queries as the course asks.
    Case("paper",
         f"{SCRATCH} --features plain --head_lr 0.4 --meta_batch_size 32 --train_query 15 --schedule constant "
         "--learning_rate 1e-3", *["--train_steps 60000 --eval_freq 2000"] * 2, minutes=600, beyond=True),
    Case("fixed_labels", "--num_classes 20 --fixed_labels --warmup_steps 0 --features plain", "--num_val_tasks 100",
         minutes=20, beyond=True),
    *on_mnist("maml/10way1shot"),
]  # fmt: skip
