"""What every script shares and nothing of any method: flags, seeds, the run folder, exact resume, reports.

The scripts call it; it never calls back and owns no train loop. A script reads:

    args = parse(parser, argv, smoke={...})
    device = setup(args)                      # seeds, device, torchrun
    run = Run(args, "hw1", dataset.name)      # runs/hw1_omniglot_2way_1shot_seed1_<time>/
    run.track(model=model, optimizer=optimizer, sampler=sampler)
    for step in run.steps():                  # continues after --resume, saves on Ctrl-C
        ...                                   # the method
        run.record(loss)
        if run.time_to_evaluate():
            with run.clock_stopped(): ...
            run.evaluated(validation_accuracy, {"Accuracy/val": ...})
    run.load_best(model)
    run.finish(metrics)
"""

from fewshot.experiment.console import keep_printing
from fewshot.experiment.device import (
    autocast,
    average_gradients,
    device_name,
    fast_in_bfloat16,
    peak_megabytes,
    precision,
    processor,
    setup,
    shard,
    started_by_torchrun,
    versions,
)
from fewshot.experiment.errors import Diverged, UserError
from fewshot.experiment.files import (
    git_commit,
    load_checkpoint,
    load_state,
    parse_python,
    read_flags,
    read_json,
    write_atomically,
    write_beside,
    write_json,
)
from fewshot.experiment.flags import (
    DEVICES,
    INIT_FROM,
    SPLITS,
    Formatter,
    Parser,
    flags_of,
    make_parser,
    new_file,
    newcomers_command,
    number,
    parse,
    whole,
)
from fewshot.experiment.run import (
    TEST_SEED,
    VAL_SEED,
    Run,
    figures_of,
    init_from,
    load_best,
    mean_and_ci95,
    report,
    run_script,
    thinned,
)
from fewshot.experiment.threads import busy_seconds, share_cores
