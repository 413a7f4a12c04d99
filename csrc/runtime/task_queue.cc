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

  void set(std::exception_ptr e) {
    {
      const std::lock_guard guard(mutex);
      done = true;
      error = std::move(e);
    }
    finished.notify_all();
  }
};

struct TaskQueue::State {
  struct Entry {
    Task task;
    std::shared_ptr<Ticket::Outcome> outcome;
  };
  explicit State(int capacity) : capacity(static_cast<std::size_t>(capacity)) {}

  std::mutex mutex;
  std::condition_variable changed;  // a task arrived or ended, or the queue closes
  std::deque<Entry> entries;
  bool running = false, closed = false, stop = false, started = false;
  const std::size_t capacity;
  const pid_t owner = getpid();

  bool idle() const { return entries.empty() && !running; }
  bool room() const { return closed || entries.size() < capacity; }

  void work() {
    std::unique_lock guard(mutex);
    for (;;) {
      changed.wait(guard, [&] { return stop || !entries.empty(); });
      if (entries.empty()) return;
      Entry entry = std::move(entries.front());
      entries.pop_front();
      running = true;
      guard.unlock();
      changed.notify_all();  // there is room
      std::exception_ptr error;
      try {
        entry.task();
      } catch (...) {
        error = std::current_exception();
      }
      entry.task = nullptr;  // what it owns goes before anyone hears that it is done
      entry.outcome->set(std::move(error));
      guard.lock();
      running = false;
      changed.notify_all();
    }
  }
};

TaskQueue::TaskQueue(int capacity) {
  require(capacity > 0, ErrorKind::value, "[TaskQueue] capacity: got ", capacity, ", expected at least 1");
  state_ = std::make_shared<State>(capacity);
}

TaskQueue::~TaskQueue() {
  if (!state_) return;
  if (state_->owner != getpid()) {  // a child of fork: the thread is not here, and its mutex may be held for ever
    new std::shared_ptr<State>(std::move(state_));
    return;
  }
  const std::lock_guard guard(state_->mutex);
  state_->closed = state_->stop = true;
  state_->changed.notify_all();
  // The thread is detached and shares the state.
}

TaskQueue::Ticket TaskQueue::push(Task& task) {
  require(!state_->closed, ErrorKind::runtime, "[TaskQueue] submit after close");
  Ticket ticket;
  ticket.outcome_ = std::make_shared<Ticket::Outcome>();
  if (!state_->started) {
    std::thread([state = state_] { state->work(); }).detach();
    state_->started = true;
  }
  state_->entries.push_back({std::move(task), ticket.outcome_});
  state_->changed.notify_all();
  return ticket;
}

std::optional<TaskQueue::Ticket> TaskQueue::try_submit(Task& task) {
  require(state_->owner == getpid(), ErrorKind::runtime, "[TaskQueue] made before fork(): a child process needs its own");
  const std::lock_guard guard(state_->mutex);
  if (!state_->room()) return std::nullopt;
  return push(task);
}

TaskQueue::Ticket TaskQueue::submit(Task task) {
  for (;;) {
    if (auto ticket = try_submit(task)) return *ticket;
    wait_for_room(std::chrono::hours(1));
  }
}

TaskQueue::Ticket TaskQueue::submit_beyond_capacity(Task task) {
  const std::lock_guard guard(state_->mutex);
  return push(task);
}

bool TaskQueue::wait_for_room(Seconds timeout) {
  std::unique_lock guard(state_->mutex);
  return state_->changed.wait_for(guard, timeout, [&] { return state_->room(); });
}

int TaskQueue::capacity() const {
  return static_cast<int>(state_->capacity);
}

bool TaskQueue::drain(Seconds timeout) {
  std::unique_lock guard(state_->mutex);
  return state_->changed.wait_for(guard, timeout, [&] { return state_->idle(); });
}

void TaskQueue::close(Seconds timeout) {
  std::deque<State::Entry> cancelled;
  {
    std::unique_lock guard(state_->mutex);
    state_->closed = true;
    state_->changed.notify_all();
    state_->changed.wait_for(guard, timeout, [&] { return state_->idle(); });
    cancelled.swap(state_->entries);
    state_->stop = true;
    state_->changed.notify_all();
  }
  for (auto& entry : cancelled) {
    entry.task = nullptr;
    entry.outcome->set(std::make_exception_ptr(Error(ErrorKind::runtime, "[TaskQueue] cancelled: closed before this task began")));
  }
}

bool TaskQueue::Ticket::wait_for(Seconds timeout) const {
  std::unique_lock guard(outcome_->mutex);
  if (!outcome_->finished.wait_for(guard, timeout, [&] { return outcome_->done; })) return false;
  if (outcome_->error) std::rethrow_exception(outcome_->error);
  return true;
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
