// A gate in a queue, for tests that need to know what has begun and what has not.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <condition_variable>
#include <mutex>

#include "base/error.h"
#include "runtime/task_queue.h"

namespace nb = nanobind;

namespace ktmoe {
namespace {

class Gate {
 public:
  void open() {
    const std::lock_guard guard(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void pass() {
    std::unique_lock guard(mutex_);
    reached_ = true;
    changed_.notify_all();
    changed_.wait(guard, [&] { return open_; });
  }
  bool wait_until_reached(Seconds timeout) {
    std::unique_lock guard(mutex_);
    return changed_.wait_for(guard, timeout, [&] { return reached_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false, reached_ = false;
};

// gate(queue): a task that runs until the gate is opened.
class QueuedGate {
 public:
  explicit QueuedGate(TaskQueue& queue) : gate_(std::make_shared<Gate>()) {
    ticket = queue.submit_beyond_capacity([gate = gate_] { gate->pass(); });
  }
  ~QueuedGate() { gate_->open(); }
  void open() { gate_->open(); }
  bool wait_until_reached(double seconds) { return gate_->wait_until_reached(Seconds(seconds)); }

  TaskQueue::Ticket ticket;

 private:
  std::shared_ptr<Gate> gate_;
};

}  // namespace

void init_queue_testing(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("testing");
  nb::class_<QueuedGate>(m, "Gate")
      .def(nb::init<TaskQueue&>())
      .def("open", &QueuedGate::open)
      .def("wait_until_reached", &QueuedGate::wait_until_reached, nb::call_guard<nb::gil_scoped_release>())
      .def_ro("ticket", &QueuedGate::ticket);
}

}  // namespace ktmoe
