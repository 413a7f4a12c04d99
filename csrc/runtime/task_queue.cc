#include "runtime/task_queue.h"

#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "base/error.h"

namespace ktmoe {

struct TaskQueue::Ticket::Outcome {
  std::mutex mutex;
  std::condition_variable finished;
  bool done = false;
  std::exception_ptr error;
};

struct TaskQueue::State {
  struct Entry {
    std::function<void()> task;
    std::shared_ptr<Ticket::Outcome> outcome;
  };
  std::mutex mutex;
  std::condition_variable changed;  // a task arrived, the last one ended, or the queue closes
  std::deque<Entry> entries;
  bool running = false, closed = false, stop = false, started = false;
  const pid_t owner = getpid();

  bool idle() const { return entries.empty() && !running; }

  void work() {
    std::unique_lock guard(mutex);
    for (;;) {
      changed.wait(guard, [&] { return stop || !entries.empty(); });
      if (entries.empty()) return;
      Entry entry = std::move(entries.front());
      entries.pop_front();
      running = true;
      guard.unlock();
      std::exception_ptr error;
      try {
        entry.task();
      } catch (...) {
        error = std::current_exception();
      }
      entry.task = nullptr;  // what it owns goes before anyone hears that it is done
      {
        const std::lock_guard outcome(entry.outcome->mutex);
        entry.outcome->done = true;
        entry.outcome->error = error;
      }
      entry.outcome->finished.notify_all();
      guard.lock();
      running = false;
      changed.notify_all();
    }
  }
};

TaskQueue::TaskQueue() : state_(std::make_shared<State>()) {}

TaskQueue::~TaskQueue() {
  if (state_->owner != getpid()) {  // a child of fork: the thread is not here, and its mutex may be held for ever
    new std::shared_ptr<State>(std::move(state_));
    return;
  }
  close(std::chrono::seconds(0));
  std::unique_lock guard(state_->mutex);
  state_->stop = true;
  state_->changed.notify_all();
  // The thread is detached and shares the state; it finishes what it has begun.
}

TaskQueue::Ticket TaskQueue::submit(std::function<void()> task) {
  require(state_->owner == getpid(), ErrorKind::runtime, "[TaskQueue] made before fork(): a child process needs its own");
  Ticket ticket;
  ticket.outcome_ = std::make_shared<Ticket::Outcome>();
  const std::lock_guard guard(state_->mutex);
  require(!state_->closed, ErrorKind::runtime, "[TaskQueue] submit after close");
  if (!state_->started) {
    std::thread([state = state_] { state->work(); }).detach();
    state_->started = true;
  }
  state_->entries.push_back({std::move(task), ticket.outcome_});
  state_->changed.notify_all();
  return ticket;
}

void TaskQueue::drain() {
  std::unique_lock guard(state_->mutex);
  state_->changed.wait(guard, [&] { return state_->idle(); });
}

void TaskQueue::close(std::chrono::duration<double> timeout) {
  std::unique_lock guard(state_->mutex);
  state_->closed = true;
  state_->changed.wait_for(guard, timeout, [&] { return state_->idle(); });
}

void TaskQueue::Ticket::wait() const {
  std::unique_lock guard(outcome_->mutex);
  outcome_->finished.wait(guard, [&] { return outcome_->done; });
  if (outcome_->error) std::rethrow_exception(outcome_->error);
}

bool TaskQueue::Ticket::done() const {
  const std::lock_guard guard(outcome_->mutex);
  return outcome_->done;
}

}  // namespace ktmoe
