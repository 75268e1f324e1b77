# The DAG: train -> figure -> claims -> report.   snakemake --cores 2 madtd_R1 | ftfl_C | figures | claims | report
# Tiers: --config tier=smoke|ci|reduced|paper. The profile in experiments/profiles/default is what `make` uses.
import os
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.27")
os.environ["PATH"] = (
    f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs run in Snakemake's environment
)
os.environ.update(DYNAREP_HOME=os.getcwd(), OMP_NUM_THREADS="1", MUJOCO_GL="disabled")

from dynarep import fingerprint
from dynarep.experiment import distinct, home, load_all, span, tier_file
from dynarep.run import root

TIER = config.get("tier", "ci")
tier_file(TIER)
EXPERIMENTS = [e for e in load_all() if TIER in e.tiers()]
FIGURE_CODE = fingerprint.of_modules(
    ["dynarep.figures", "dynarep.records", "dynarep.schema"]
)
CLAIM_CODE = fingerprint.of_modules(
    ["dynarep.claims", "dynarep.stats", "dynarep.records", "dynarep.schema"]
)
REPORT_CODE = fingerprint.of_modules(
    ["dynarep.report", "dynarep.claims", "dynarep.records"]
)


def records(jobs):
    """Files that a list of jobs leaves behind."""
    folders = [f"results/runs/{folder}" for job in jobs for folder in job.folders()]
    return [
        f"{folder}/{name}"
        for folder in folders
        for name in ("metrics.csv", "manifest.json")
    ]


def figure_files(experiment):
    base = f"figures/{TIER}/{experiment.spec.paper}/{experiment.spec.id}"
    return [f"{base}.{kind}" for kind in ("csv", "svg", "pdf", "png")]


FIGURES = [file for e in EXPERIMENTS for file in figure_files(e)]
RUNS = records(distinct([job for e in EXPERIMENTS for job in e.jobs(TIER)]))


rule all:
    default_target: True
    input:
        f"results/runs/report/{TIER}.html",
        f"results/runs/claims/{TIER}.json",


# One rule per job: how many seeds, and so how many files, a job has differs. Checkpoints lie beside the outputs,
# undeclared: Snakemake deletes declared outputs before a job starts, and a stopped job must find its checkpoint.
for job in distinct([job for e in EXPERIMENTS for job in e.jobs(TIER)]):

    rule:
        name:
            f"train_{job.variant}_{job.task}_{span(job.seeds)}_{job.config.identity()[:8]}"
        output:
            records([job]),
        log:
            f"results/runs/log/{job.key().replace('/', '_')}.log",
        threads: 1
        params:
            code=fingerprint.of_parts(job.config.agent, job.config.protocol),
            lock=fingerprint.of_lock(root()),
            what=f"--experiment {job.experiment} --variant {job.variant} --task {job.task} --runs {job.group}",
            seeds=span(job.seeds),
        shell:
            "python -m dynarep train {params.what} --seeds {params.seeds} --tier {TIER} >{log} 2>&1"


for experiment in EXPERIMENTS:

    rule:
        name:
            f"{experiment.key}"
        input:
            runs=records(experiment.jobs(TIER)),
            file=experiment.file.relative_to(home()),
        output:
            figure_files(experiment),
        log:
            f"results/runs/log/figure_{TIER}_{experiment.key}.log",
        params:
            code=FIGURE_CODE,
        shell:
            f"python -m dynarep figure --experiment {experiment.key} --tier {TIER} >{{log}} 2>&1"


rule figures:
    input:
        FIGURES,


rule claims:
    input:
        RUNS,
        [e.file.relative_to(home()) for e in EXPERIMENTS],
    output:
        f"results/runs/claims/{TIER}.json",
    log:
        f"results/runs/log/claims_{TIER}.log",
    params:
        code=CLAIM_CODE,
    shell:
        "python -m dynarep claims --tier {TIER} --out {output} >{log} 2>&1"


rule report:
    input:
        FIGURES,
        f"results/runs/claims/{TIER}.json",
    output:
        f"results/runs/report/{TIER}.html",
    log:
        f"results/runs/log/report_{TIER}.log",
    params:
        code=REPORT_CODE,
    shell:
        "python -m dynarep report --tier {TIER} >{log} 2>&1"
