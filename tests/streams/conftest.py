"""A stand-in for the CUDA driver, and one stream on it."""

from collections.abc import Iterator

import fake_cuda
import pytest

from ktmoe import KTMoEWrapper, inference


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> fake_cuda.Driver:
    if fake_cuda.compiler() is None:
        pytest.skip("no C++ compiler: the stand-in for the CUDA driver cannot be built")
    return fake_cuda.Driver(fake_cuda.build(tmp_path_factory.mktemp("driver")))


@pytest.fixture
def device(driver: fake_cuda.Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cuda.Device]:
    """Tensors are taken to be on the device where a stream is given."""
    monkeypatch.setenv("KTMOE_CUDA_DRIVER", str(driver.path))
    made = fake_cuda.Device(driver)
    monkeypatch.setattr(inference, "stream_of", made.stream_of)
    yield made
    KTMoEWrapper.set_capture_batch_sizes([])
    made.driver.hold(made.handle, False)
    KTMoEWrapper.clear_buffer_cache()
    made.destroy()
    assert driver.violations() == 0  # no host function called the driver
