# train -> figure -> claims -> report.   snakemake --cores 2 madtd_R1 | ftfl_C | figures | report  [--config tier=ci]
import os
import sys
from snakemake.utils import min_version

min_version("9.27")
path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # jobs run in Snakemake's environment
os.environ.update(PATH=path, DYNAREP_HOME=os.getcwd(), OMP_NUM_THREADS="1")

from dynarep import dag

TIER = config.get("tier", "ci")
EXPERIMENTS, JOBS = dag.load(TIER)
FIGURES = [file for e in EXPERIMENTS for file in dag.figure_files(e, TIER)]


rule all:
    default_target: True
    input:
        f"results/runs/report/{TIER}.html",
        dag.run_files(JOBS),  # asked for by name, because a deleted run is not missed where its figure exists


# One rule per process: how many files it has differs. Checkpoints lie beside the outputs, undeclared, because Snakemake
# deletes declared outputs before a job starts. Shell commands are formatted late: what differs goes through params.
for bundle in dag.bundles(JOBS):

    rule:
        name:
            bundle.name
        output:
            dag.run_files(bundle.jobs),
        log:
            f"results/runs/log/{bundle.name}.log",
        priority: dag.priority(bundle.jobs)
        params:
            **dag.made_by(bundle.jobs),
            what=dag.arguments(bundle.jobs),
        shell:
            "python -m dynarep train {params.what} >{log} 2>&1"


for experiment in EXPERIMENTS:

    rule:
        name:
            experiment.key
        input:
            dag.figure_files(experiment, TIER),
            dag.run_files(experiment.jobs(TIER)),


for together in dag.drawings(EXPERIMENTS, TIER):

    rule:
        name:
            "_".join(["draw", *(e.key for e in together)])
        input:
            [dag.run_files(e.jobs(TIER)) for e in together],
            [dag.sources(e) for e in together],
        output:
            [file for e in together for file in dag.figure_files(e, TIER)],
        log:
            f"results/runs/log/figure_{TIER}_{together[0].key}.log",
        params:
            what=" ".join(e.key for e in together),
            code=dag.code("figures"),
        shell:
            "python -m dynarep figure --experiment {params.what} --tier {TIER} >{log} 2>&1"


rule figures:
    input:
        FIGURES,


rule claims:
    input:
        dag.run_files(JOBS),
        [dag.sources(e) for e in EXPERIMENTS],
    output:
        f"results/runs/claims/{TIER}.json",
    log:
        f"results/runs/log/claims_{TIER}.log",
    params:
        code=dag.code("claims"),
    shell:
        "python -m dynarep claims --tier {TIER} --out {output} >{log} 2>&1"


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
    shell:
        "python -m dynarep report --tier {TIER} >{log} 2>&1"
