// A stand-in for the CUDA driver library: a stream is a thread that does its work in order. It has the two functions that ktmoe asks
// the driver for, and copies, capture and replay for the tests. Host functions must not call it, as they must not call CUDA.
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Work = std::function<void()>;
thread_local bool in_host_function = false;
std::mutex counters;
int violations = 0, failures = 0;

struct Stream {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Work> work;
  std::vector<Work>* graph = nullptr;  // not null: capturing
  bool running = false, held = false, stop = false;
  std::thread thread{[this] { run(); }};

  ~Stream() {
    {
      const std::lock_guard guard(mutex);
      stop = true;
    }
    changed.notify_all();
    thread.join();
  }
  void run() {
    std::unique_lock guard(mutex);
    for (;;) {
      changed.wait(guard, [&] { return stop || (!held && !work.empty()); });
      if (work.empty() || held) return;
      const Work next = std::move(work.front());
      work.pop_front();
      running = true;
      guard.unlock();
      next();
      guard.lock();
      running = false;
      changed.notify_all();
    }
  }
  void add(Work w) {
    const std::lock_guard guard(mutex);
    if (graph) return graph->push_back(std::move(w));
    work.push_back(std::move(w));
    changed.notify_all();
  }
};

void enter() {
  const std::lock_guard guard(counters);
  violations += in_host_function;
}

}  // namespace

extern "C" {

int cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  enter();
  {
    const std::lock_guard guard(counters);
    if (failures > 0) return --failures, 719;
  }
  static_cast<Stream*>(stream)->add([=] {
    in_host_function = true;
    function(data);
    in_host_function = false;
  });
  return 0;
}

int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_LAUNCH_FAILED";
  return 0;
}

void* fake_stream_create() {
  return new Stream;
}
void fake_stream_destroy(Stream* stream) {
  delete stream;
}

void fake_copy(Stream* stream, void* to, const void* from, std::size_t bytes) {
  enter();
  stream->add([=] { std::memcpy(to, from, bytes); });
}

// The stream stops after what it does now, until it is released.
void fake_hold(Stream* stream, bool held) {
  const std::lock_guard guard(stream->mutex);
  stream->held = held;
  stream->changed.notify_all();
}

void fake_mark(Stream* stream, int* flag) {
  stream->add([=] { __atomic_store_n(flag, 1, __ATOMIC_RELEASE); });
}

void fake_synchronize(Stream* stream) {
  enter();
  std::unique_lock guard(stream->mutex);
  stream->changed.wait(guard, [&] { return stream->work.empty() && !stream->running; });
}

void fake_begin_capture(Stream* stream) {
  const std::lock_guard guard(stream->mutex);
  stream->graph = new std::vector<Work>;
}
void* fake_end_capture(Stream* stream) {
  const std::lock_guard guard(stream->mutex);
  return std::exchange(stream->graph, nullptr);
}
bool fake_capturing(Stream* stream) {
  const std::lock_guard guard(stream->mutex);
  return stream->graph;
}
void fake_replay(const std::vector<Work>* graph, Stream* stream) {
  for (const Work& w : *graph) stream->add(w);
}
void fake_fail_launches(int n) {
  failures = n;
}
int fake_violations() {
  return violations;
}
}
