# SPDX-License-Identifier: Apache-2.0
"""The scripts in launch/, with a shell script in place of the programs that they start."""

import os
import signal
import subprocess
import time

import pytest
import yaml

from tnt_flax.core.errors import STALLED, STOPPED

FLAGS = ["--config=configs/digits.py", "--workdir=runs/my digits"]


@pytest.fixture
def launch(root, tmp_path):
    """Returns a function that runs a launch script and returns its exit code and output.

    `program` is replaced by a script that writes its arguments to the output, one per line, and
    exits with the next of `codes`.
    """

    def launch(file, arguments, program, codes, **env):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        for name, text in {
            program: 'printf "%s\\n" "$0" "$@" >>"$OUTPUT"\n'
            '[ -z "$SRUN_CPUS_PER_TASK" ] || echo "$SRUN_CPUS_PER_TASK CPUs per task" >>"$OUTPUT"\n'
            'code=$(head -n 1 "$CODES"); sed -i 1d "$CODES"; exit "${code:-0}"\n',
            "scontrol": 'echo "scontrol $*" >>"$OUTPUT"\n',
        }.items():
            path = tmp_path / name
            path.write_text("#!/bin/sh\n" + text)
            path.chmod(0o755)
        paths = {"OUTPUT": str(tmp_path / "output"), "CODES": str(tmp_path / "codes")}
        env = os.environ | env | paths
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
        env["PYTHON"] = str(tmp_path / "python")
        shell = "bash" if file.endswith("sbatch") else "sh"
        (tmp_path / "output").unlink(missing_ok=True)
        command = [shell, f"launch/{file}", *arguments]
        code = subprocess.run(command, cwd=root, env=env, timeout=60).returncode
        return code, (tmp_path / "output").read_text().replace(f"{tmp_path}/", "").splitlines()

    return launch


def test_processes_sh_starts_all_and_returns_their_exit_code(launch):
    code, output = launch("processes.sh", ["2", *FLAGS], "python", [42, 42], PORT="7000")
    assert code == 42
    common = ["python", "main.py", *FLAGS, "--coordinator=127.0.0.1:7000", "--num-processes=2"]
    assert sorted(output) == sorted([*common, "--process-id=0", *common, "--process-id=1"])


def test_processes_sh_forwards_sigterm_and_waits(root, tmp_path):
    trap = "trap 'sleep 0.2; exit 42' TERM; echo ready >>\"$OUTPUT\"; while :; do sleep 0.05; done"
    (tmp_path / "python").write_text(f"#!/bin/sh\n{trap}\n")
    (tmp_path / "python").chmod(0o755)
    output = tmp_path / "output"
    env = os.environ | {"PYTHON": str(tmp_path / "python"), "OUTPUT": str(output)}
    process = subprocess.Popen(["sh", "launch/processes.sh", "2"], cwd=root, env=env)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (output.exists() and output.stat().st_size == 12):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 42


def test_openmpi_sh_passes_flags_and_exit_code(launch):
    flags = {"MPIRUN_FLAGS": "--hostfile hosts"}
    code, output = launch("openmpi.sh", ["4", *FLAGS], "mpirun", [42], **flags)
    assert code == 42
    assert output == ["mpirun", "-n", "4", "--hostfile", "hosts", "python", "main.py", *FLAGS]


@pytest.mark.parametrize(
    "code, restarts, again",
    [(0, 0, False), (1, 0, False), (2, 0, False), (42, 0, True), (75, 3, True), (42, 20, False)],
)
def test_slurm_requeues_after_resumable_exit_codes(launch, code, restarts, again):
    env = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
    ended, output = launch("slurm.sbatch", FLAGS, "srun", [code], **env)
    assert ended == code
    assert output[-3 - again :][: 3 + again] == [
        "main.py",
        *FLAGS,
        *(["scontrol requeue 17"] if again else []),
    ]


def test_slurm_passes_the_cpus_of_a_task_to_srun(launch):
    _, output = launch("slurm.sbatch", FLAGS, "srun", [0], SLURM_CPUS_PER_TASK="16")
    assert output[-1] == "16 CPUs per task"


def test_tpu_vm_sh_restarts_after_resumable_exit_codes(launch):
    env = {"TPU": "slice", "ZONE": "zone"}
    code, output = launch("tpu_vm.sh", FLAGS, "gcloud", [42, 75, 0], **env)
    assert code == 0 and output.count("gcloud") == 3
    assert output[1:8] == "compute tpus tpu-vm ssh slice --zone=zone --worker=all".split()
    assert output[8].endswith(
        "exec python main.py '--config=configs/digits.py' '--workdir=runs/my digits'"
    )
    code, output = launch("tpu_vm.sh", FLAGS, "gcloud", [2], **env)
    assert code == 2


def test_kubernetes_manifest_is_consistent(root):
    manifest = yaml.safe_load((root / "launch/jobset.yaml").read_text())
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    (job,) = spec["replicatedJobs"]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    args = dict(arg.removeprefix("--").split("=", 1) for arg in container["args"])
    assert pods["parallelism"] == pods["completions"] == int(args["num-processes"])
    host, _, port = args["coordinator"].partition(":")
    assert host == f"{name}-{job['name']}-0-0.{name}" and spec["network"]["enableDNSHostnames"]
    assert container["ports"] == [{"containerPort": int(port)}]
    (rule,) = pods["podFailurePolicy"]["rules"]
    assert not {STOPPED, STALLED} & set(rule["onExitCodes"]["values"])
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_kubernetes_manifest_matches_the_schema_of_jobset(root):
    """JobSet's own models drop unknown fields and fields of another type."""
    jobset = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set")
    manifest = yaml.safe_load((root / "launch/jobset.yaml").read_text())
    read = jobset.JobsetV1alpha2JobSet.model_validate(manifest)
    assert read.model_dump(by_alias=True, exclude_unset=True) == manifest
