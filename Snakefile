# train -> figure -> claims -> report.   snakemake --cores 2 madtd_R1 | ftfl_C | madtd | figures | report
#   [--config tier=ci]    the budget    [--config from=reference]    committed runs instead of training
#   [--profile experiments/profiles/slurm]    on a cluster    [--config device=cuda hours=24]    a GPU each, a day at most
import os
import sys
from functools import partial
from pathlib import Path
from snakemake.utils import min_version

min_version("9.27")
# Each job's own environment: this is read again on the machine that runs it, where it finds Snakemake's programs.
path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
os.environ.update(PATH=path, DYNAREP_HOME=os.getcwd(), OMP_NUM_THREADS="1")
os.environ.setdefault("MUJOCO_GL", "disabled")

from dynarep import dag, scheduler
from dynarep.errors import UserError
from dynarep.resources import Place

TIER, FROM = config.get("tier", "ci"), config.get(
    "from", "runs"
)  # from=reference: committed runs, none are made
if workflow.is_main_process:
    TURN = scheduler.Turn(Path.cwd())

try:
    WHERE = ("device", "hours", "workers")
    PLACE = Place(**{key: config[key] for key in WHERE if key in config})
    EXPERIMENTS, JOBS = dag.load(TIER, FROM)
except UserError as error:
    raise WorkflowError(str(error)) from None
run_files = partial(dag.run_files, source=FROM)
SHOWN = "--from reference" if FROM == "reference" else ""
FIGURES = [file for e in EXPERIMENTS for file in dag.figure_files(e, TIER)]
BUNDLES, FAMILIES = dag.families(dag.bundles(JOBS) if FROM == "runs" else [])


onstart:
    if workflow.is_main_process:
        try:
            TURN.take(here=workflow.local_exec)
        except UserError as error:
            raise WorkflowError(str(error)) from None
        if workflow.local_exec:
            scheduler.without_rounds(workflow.scheduler)
            if PLACE.device == "cpu" and any(job.compiled for job in JOBS):
                shell("python -m dynarep.warm")


rule all:
    default_target: True
    input:
        f"results/runs/report/{TIER}.html",
        f"results/runs/claims/{TIER}.json",
        FIGURES,
        run_files(JOBS),  # all asked for by name: what is deleted is not missed where all that is made of it exists


# One rule per process: how many files it has differs. Checkpoints lie beside the outputs, undeclared, because Snakemake
# deletes declared outputs before a job starts. Shell commands are formatted late: what differs goes through params.
for bundle in BUNDLES:

    rule:
        name:
            bundle.name
        output:
            run_files(bundle.jobs),
        log:
            f"results/runs/log/{bundle.name}.log",
        priority: dag.priority(bundle.jobs)
        resources:
            **PLACE.resources(bundle.jobs),
        params:
            **dag.made_by(bundle.jobs),
            what=dag.arguments(bundle.jobs),
        shell:
            "python -m dynarep train {params.what} {PLACE.option} >{log} 2>&1"


for family in FAMILIES:

    rule:
        name:
            family.name
        output:
            family.outputs(),
        log:
            f"results/runs/log/{family.name}/{{run}}.log",
        wildcard_constraints:
            run=family.constraint(),
        priority: max(dag.priority([job]) for job in family.jobs.values())
        resources:
            **PLACE.resources(family.jobs),
        params:
            **dag.made_by(family.jobs.values()),
            what=lambda wildcards, jobs=family.jobs: dag.arguments(
                [jobs[wildcards.run]]
            ),
        shell:
            "python -m dynarep train {params.what} {PLACE.option} >{log} 2>&1"


for experiment in EXPERIMENTS:

    rule:
        name:
            experiment.key
        input:
            dag.figure_files(experiment, TIER),
            run_files(experiment.jobs(TIER)),


for paper in dict.fromkeys(e.spec.paper for e in EXPERIMENTS):

    rule:
        name:
            paper
        input:
            [
                [*dag.figure_files(e, TIER), *run_files(e.jobs(TIER))]
                for e in EXPERIMENTS
                if e.spec.paper == paper
            ],


for together in dag.drawings(EXPERIMENTS, TIER):

    rule:
        name:
            "_".join(["draw", *(e.key for e in together)])
        input:
            [run_files(e.jobs(TIER), names=[dag.METRICS]) for e in together],  # claims watch manifests
            [dag.sources(e) for e in together],
        output:
            [file for e in together for file in dag.figure_files(e, TIER)],
        log:
            f"results/runs/log/figure_{TIER}_{together[0].key}.log",
        params:
            what=" ".join(e.key for e in together),
            code=dag.code("figures", together),
            source=SHOWN,
        shell:
            "python -m dynarep figure --experiment {params.what} --tier {TIER} {params.source} >{log} 2>&1"


rule figures:
    input:
        FIGURES,


rule claims:
    input:
        run_files(JOBS, names=[dag.MANIFEST]),
        [dag.sources(e) for e in EXPERIMENTS],
    output:
        f"results/runs/claims/{TIER}.json",
    log:
        f"results/runs/log/claims_{TIER}.log",
    priority: 1  # before the figures, so that nobody waits for it in the end
    params:
        code=dag.code("claims"),
        made=" ".join(dag.made_by(JOBS).values()),  # a verdict says whether its runs are of this code
        source=SHOWN,
    shell:
        "python -m dynarep claims --tier {TIER} {params.source} --out {output} >{log} 2>&1"


rule report:
    input:
        FIGURES,
        rules.claims.output,
    output:
        f"results/runs/report/{TIER}.html",
    log:
        f"results/runs/log/report_{TIER}.log",
    params:
        code=dag.code("report"),
        source=SHOWN,
    shell:
        "python -m dynarep report --tier {TIER} {params.source} >{log} 2>&1"
