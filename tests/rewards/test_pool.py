"""The pool survives scorers that hang, crash, raise and eat memory, and its failures are never rewards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
from hostile_task import PROBLEM, HostileTask
from pydantic import TypeAdapter

from megatron_hdpo.data.tasks import JsonlTask, TaskConfig
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.pool import RewardPool, RewardPoolError
from megatron_hdpo.types.problem import Problem

MATH = Problem(id="math/0", task="math", question="?", answer="1")
TIME_LIMIT = 1.0
OWN_TASK = """
import os, sys
from megatron_hdpo.types.task import TaskBase

class Own(TaskBase):
    share: float = 0.25

    def problems(self, report):
        return []

    def score(self, problem, response):
        if response == "die":
            os._exit(1)
        return float("torch" in sys.modules) if response == "torch" else self.share
"""
# Of multiprocessing.forkserver: methods of its one server under the names by which the library calls them.
FORK_SERVER_FUNCTIONS = ("ensure_running", "get_inherited_fds", "connect_to_new_process", "set_forkserver_preload")


@pytest.fixture(scope="module", autouse=True)
def fork_server_of_its_own():
    """Fork these tests' workers from a server without torch, whatever tests before these have started.

    The process's own server is set aside, not stopped: that would wait for ever for ranks that other tests keep.
    """
    server = forkserver.ForkServer()
    replaced = {"_forkserver": server} | {name: getattr(server, name) for name in FORK_SERVER_FUNCTIONS}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(forkserver, name, value)
        yield
        server._stop()


@pytest.fixture(scope="module")
def pool(fork_server_of_its_own):
    tasks = [HostileTask(), JsonlTask(kind="jsonl", path=Path("unread.jsonl"), name="math")]
    config = RewardConfig(
        workers=2, time_limit_s=TIME_LIMIT, hang_limit_s=TIME_LIMIT, max_retries=0, memory_limit_mib=256
    )
    with RewardPool(tasks, config) as pool:
        pool.start()
        yield pool


def judge(pool, response):
    return pool.submit(PROBLEM, response).result(timeout=60)


def test_rewards_come_back_in_order(pool):
    responses = [f"reward:{i / 1000}" for i in range(1000)]
    judgements = pool.judge([(PROBLEM, response) for response in responses])
    assert [j.reward for j in judgements] == [i / 1000 for i in range(1000)]
    assert all(j.error is None and 0 <= j.seconds < TIME_LIMIT for j in judgements)


def test_feedback_comes_with_the_reward(pool):
    assert [judge(pool, f"reward:{reward}").feedback for reward in (0, 1)] == ["no", None]


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("exit:1", "died with exit code 1"),
        ("exit:0", "within the time limit"),
        ("system_exit", "SystemExit: 3"),
        ("segfault", "died with exit code -11"),
        ("raise", "Unpicklable: one"),
        ("hang", "within the time limit of 1 s"),
        ("hang_in_c", "within the time limit of 1 s"),
        ("ignore_term", "within the time limit of 1 s"),
        ("allocate:4096", "MemoryError"),
        ("reward:nan", "scored nan"),
        ("reward:1.5", "scored 1.5"),
        ("reward:many", "ValueError"),
        ("reward:0.50", "gave int as feedback"),
        ("no_such_verb", "AttributeError"),
    ],
)
def test_a_failed_check_has_no_reward_but_an_error(pool, response, error):
    judgement = judge(pool, response)
    assert judgement.reward is None
    assert error in judgement.error
    assert judge(pool, "reward:1").reward == 1.0


@pytest.mark.parametrize("answer", ["9^{9^{9^9}}", "(10^{10})!"])
@pytest.mark.fault(
    "an answer that nobody can evaluate (`9^{9^{9^9}}`)",
    phase="checking",
    seen="nothing: it is a wrong answer",
    lost="nothing",
)
def test_expressions_that_never_end_are_wrong(pool, answer):
    judgements = pool.judge([(MATH, rf"\boxed{{{answer}}}"), (MATH, r"\boxed{\frac{2}{2}}"), (MATH, r"\boxed{2}")])
    assert [j.reward for j in judgements] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("room_mib", [64, 1 << 20])
def test_a_hard_limit_of_the_system_stays(room_mib):
    """`ulimit -v` sets both limits; only a privileged process could raise the hard one, and it should not."""
    code = (
        "import resource, sys; from pathlib import Path; from megatron_hdpo.rewards import worker\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "hard = used + int(sys.argv[1]) * worker.MIB\n"
        "resource.setrlimit(resource.RLIMIT_AS, (hard, hard))\n"
        "worker._limit_memory(256)\n"
        "soft, after = resource.getrlimit(resource.RLIMIT_AS)\n"
        "assert after == hard and soft <= hard and soft <= used + 300 * worker.MIB, (soft, after, hard)"
    )
    subprocess.run([sys.executable, "-c", code, str(room_mib)], check=True)


def test_processor_time_is_limited_and_not_time_on_the_clock():
    """`sleep` stands for a machine so busy that a check waits for its turn."""
    config = RewardConfig(workers=1, time_limit_s=0.5, max_retries=0)
    with RewardPool([HostileTask()], config) as pool:
        assert judge(pool, "sleep:1").reward == 1.0
        spun = judge(pool, "spin")
        assert spun.reward is None and "within the limit of processor time" in spun.error
        for _ in range(3):  # the limit is that of one check, not of the process
            assert judge(pool, "spin:0.3").reward == 1.0


def test_the_time_limit_does_not_count_waiting(pool):
    """Six hanging checks on two workers hold everybody else up for about three time limits."""
    judgements = pool.judge([(PROBLEM, "hang")] * 6 + [(PROBLEM, "reward:1")] * 200)
    assert [j.reward for j in judgements] == [None] * 6 + [1.0] * 200


@pytest.mark.fault(
    "a checking process dies",
    phase="checking",
    seen="nothing; `rollout/check_failed` if the next one dies, too",
    lost="nothing",
)
def test_a_dead_worker_is_replaced_and_the_check_tried_again(tmp_path):
    with RewardPool([HostileTask()], RewardConfig(workers=1, time_limit_s=600, max_retries=1)) as pool:
        assert judge(pool, f"fail_once:{tmp_path / 'tried'}").reward == 1.0
        # `judge` gives up after a minute: neither may wait for the time limit.
        assert judge(pool, "exit:1").reward is None
        assert judge(pool, "raise").error == "Unpicklable: one"


def test_threads_may_submit_at_the_same_time(pool):
    with ThreadPoolExecutor(4) as threads:
        judgements = list(threads.map(lambda i: judge(pool, f"reward:{i % 2}"), range(200)))
    assert [j.reward for j in judgements] == [float(i % 2) for i in range(200)]


@pytest.mark.fault("an idle checking process is killed", phase="checking", seen="nothing", lost="nothing")
def test_a_worker_killed_from_outside_breaks_nothing(pool, tmp_path):
    """The worker is idle: Pebble takes its end for the end of all workers, and its pool has to be replaced."""
    for _ in range(2):
        judge(pool, f"pid:{tmp_path / 'pids'}")
        os.kill(int((tmp_path / "pids").read_text().split()[-1]), signal.SIGKILL)
        time.sleep(0.3)
    retrying = [pool.submit(PROBLEM, "reward:1") for _ in range(50)]
    assert {future.result(timeout=60).reward for future in retrying} == {1.0}


def test_workers_do_not_hold_torch(pool):
    import torch  # noqa: F401  the parent does

    assert judge(pool, "has_torch").reward == 0.0


def test_an_unknown_task_is_an_error(pool):
    judgement = pool.submit(Problem(id="x/0", task="x", question="?", answer="!"), "1").result()
    assert judgement.reward is None and "the pool has: hostile, math" in judgement.error


def test_tasks_that_cannot_be_prepared_say_so_at_the_start():
    with (
        RewardPool([HostileTask(prepare_error=True)], RewardConfig(workers=1)) as pool,
        pytest.raises(RewardPoolError, match="cannot prepare its tasks: ImportError: no such library"),
    ):
        pool.start()


def test_tasks_must_not_share_a_name():
    with pytest.raises(ValueError, match="share a name: hostile"):
        RewardPool([HostileTask(), HostileTask()])


def test_close_ends_everything_at_once():
    pool = RewardPool([HostileTask()], RewardConfig(workers=2, time_limit_s=3600, max_retries=3))
    pool.start()
    futures = [pool.submit(PROBLEM, "hang") for _ in range(3000)]
    workers = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    begin = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - begin < 300
    assert {future.result(timeout=1).reward for future in futures} == {None}
    assert "closed" in judge(pool, "reward:1").error
    assert len(workers) >= 3


PARENT = """
import sys
from hostile_task import PROBLEM, HostileTask
from megatron_hdpo.rewards.config import RewardConfig
from megatron_hdpo.rewards.pool import RewardPool
if __name__ == "__main__":
    pool = RewardPool([HostileTask()], RewardConfig(workers=2, time_limit_s=600))
    pool.judge([(PROBLEM, "pid:" + sys.argv[1])] * 4)
    hanging = [pool.submit(PROBLEM, "hang_in_c"), pool.submit(PROBLEM, "hang")]
    print("ready", flush=True)
    hanging[0].result()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel kills the workers on Linux only")
@pytest.mark.fault(
    "the trainer is killed amid checks", phase="checking", seen="no checking process is left", lost="nothing"
)
def test_no_worker_outlives_a_killed_parent(tmp_path):
    script, pids = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(PARENT)
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "tests" / "helpers"), str(root)])
    parent = subprocess.Popen(
        [sys.executable, str(script), str(pids)], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE
    )
    assert parent.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert {int(pid) for pid in pids.read_text().split()} <= {process.pid for process in family}
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_task_in_a_file_of_the_users_own_is_scored_by_the_code_that_was_read(tmp_path):
    """In workers that find no such module, and in the successor of one that died after the file was edited."""
    file = tmp_path / "own.py"
    file.write_text(OWN_TASK)
    task = TypeAdapter(TaskConfig).validate_python({"kind": f"{file}:Own", "share": 0.5})
    problem = Problem(id="Own/0", task="Own", question="?", answer="1")
    with RewardPool([task], RewardConfig(workers=1, max_retries=0)) as pool:
        assert [j.reward for j in pool.judge([(problem, "right"), (problem, "torch")])] == [0.5, 0.0]
        file.write_text(OWN_TASK.replace("self.share", "0.125"))
        assert "exit code 1" in pool.submit(problem, "die").result(timeout=60).error
        assert pool.submit(problem, "right").result(timeout=60).reward == 0.5
