"""``orchestra limits`` as its users meet it: real processes, a real Redis."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from orchestra.flow_control import BackpressureConfig, RateLimitConfig, RedisRateLimiter


def cli(*args: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "orchestra.cli", "limits", *args], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


async def test_set_ls_and_reset(manager, redis_url):
    assert cli("ls") == (0, "no limits are in use\n", "")
    settings = BackpressureConfig(rate_limit=RateLimitConfig(rate=0.01, burst=5))
    limiter = RedisRateLimiter("openai:{tenant}", settings, manager=manager)
    assert await limiter.acquire(key="a", cost=3)
    status, out, _ = cli("ls", "--redis", redis_url)
    assert status == 0
    assert out.splitlines()[1].split() == ["openai:{tenant}", "all", "0.01/s", "5", "1", "2"]
    assert cli("set", "openai:{tenant}", "--rate", "100", "--burst", "50", "--redis", redis_url)[0] == 0
    assert (await limiter.try_acquire(cost=1, key="fresh")).remaining == 49
    status, out, _ = cli("ls", "--json")
    listed = json.loads(out)
    assert (status, listed["rate"], listed["burst"], listed["version"] > 0) == (0, 100.0, 50, True)
    status, out, _ = cli("reset", "openai:{tenant}", "--json")
    assert (status, json.loads(out)["reset"]) == (0, True)
    assert (await limiter.try_acquire(key="another")).remaining == 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("set", "api", "--rate", "0", "--burst", "5"), "RateLimitConfig.rate must be a number of permits per period"),
        (("set", "api", "--rate", "nan", "--burst", "5"), "RateLimitConfig.rate"),
        (("set", "api", "--rate", "1", "--burst", "0"), "RateLimitConfig.burst"),
        (("set", "api", "--rate", "1", "--burst", "1", "--scope", "}"), "--scope"),
        (("reset", "a b"), "limiter name"),
        (("reset", "app", "one", "two"), "one limit"),
        (("ls", "--redis", "memory:"), "memory:"),
    ],
)
def test_bad_usage_is_one_line_and_status_two(redis_url, args, words):
    status, out, err = cli(*args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
