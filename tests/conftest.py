"""Fixes what would make a test run differ from the last one."""

import os
import signal

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ktmoe",
    derandomize=True,
    deadline=None,
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ktmoe")
os.environ["KTMOE_CACHE"] = "off"  # a test that wants a cache names its own folder
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
torch.set_num_threads(1)  # the references are small; torch's threads would only fight the engine's
