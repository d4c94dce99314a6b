// threads_test.cc - any number of threads may call at once, with different arguments, and a process may fork: every
// call gives the bits that it gives alone. Meant to run under the thread sanitizer as well.
#include <gtest/gtest.h>

#include <sys/wait.h>
#include <unistd.h>

#include "case.h"

namespace pnn_test {
namespace {

// Different sizes, types, masks and layouts, small enough for the thread sanitizer.
std::vector<Case> cases() {
  std::vector<Case> list;
  for (size_t i = 0; i < 12; i++) {
    Case c;
    set_types(c, type_pairs()[i % type_pairs().size()]);
    c.B = 2 + static_cast<int64_t>(i % 3), c.C = 4 + static_cast<int64_t>(i), c.T = 9, c.H = 9, c.W = 17;
    c.M = 1 + static_cast<int64_t>(i % 2), c.noise = static_cast<pnn_noise>(i % PNN_NOISE_COUNT);
    c.activation = static_cast<pnn_activation>(i % PNN_ACTIVATION_COUNT);
    c.norm = i % 3 == 0, c.training = i % 2 == 0, c.eps = 1e-5, c.fill = Fill::kRandom, c.seed = i + 1;
    if (i % 4 == 1) c.input_layout = c.output_layout = c.grad_output_layout = LayoutKind::kChannelsLast;
    list.push_back(c);
  }
  return list;
}

std::vector<uint64_t> results(const Case &c, const pnn_host *host = nullptr) {
  Problem problem(c);
  EXPECT_EQ(problem.forward(host), PNN_OK) << problem.error.message;
  EXPECT_EQ(problem.backward(host), PNN_OK) << problem.error.message;
  return problem.result_bits();
}

// Comes first, so that the library's very first call, which chooses the instruction set, is made by many threads.
TEST(Threads, FirstCallsAtOnce) {
  std::vector<std::string> names(8);
  std::vector<std::thread> threads;
  for (std::string &name : names) {
    threads.emplace_back([&name] { name = pnn_isa_name(); });
  }
  for (std::thread &thread : threads) thread.join();
  for (const std::string &name : names) EXPECT_EQ(name, pnn_isa_name());
}

TEST(Threads, ManyCallersAtOnce) {
  const std::vector<Case> list = cases();
  std::vector<std::vector<uint64_t>> expected;
  for (const Case &c : list) expected.push_back(results(c));
  std::atomic<int64_t> wrong{0};
  std::atomic<int64_t> calls{0};
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < 8; caller++) {
    callers.emplace_back([&, caller] {
      for (size_t i = 0; i < list.size(); i++) {
        const size_t which = (i * 5 + caller) % list.size();
        // Some with threads of their own, some with the library's, some alone.
        ThreadHost host(2, TaskOrder::kReversed);
        const pnn_host *chosen = caller % 3 == 0 ? host.get() : nullptr;
        if (results(list[which], chosen) != expected[which]) wrong++;
        calls++;
      }
    });
  }
  for (std::thread &caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(calls, static_cast<int64_t>(8 * list.size()));
}

// The same inputs, read by many calls at once, each with outputs of its own.
TEST(Threads, SharedInputs) {
  Case c = cases()[3];
  Problem shared(c);
  ASSERT_EQ(shared.forward(), PNN_OK);
  const std::vector<uint64_t> expected = shared.output.bits();
  std::atomic<int64_t> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; caller++) {
    callers.emplace_back([&] {
      Random random(7);
      Tensor output(c.weight_type, {c.B, c.T, c.H, c.W}, LayoutKind::kContiguous, random, Placement::kZones,
                    Poison::kNan, 0);
      pnn_params p = shared.params;
      Tensor mean(c.statistics_type(), {c.K()}, LayoutKind::kContiguous, random, Placement::kZones, Poison::kNan, 0);
      Tensor variance(c.statistics_type(), {c.K()}, LayoutKind::kContiguous, random, Placement::kZones, Poison::kNan,
                      0);
      if (c.norm && c.training) {
        p.mean = mean.view();
        p.variance = variance.view();
      }
      p.output = output.view();
      size_t bytes = 0;
      if (pnn_workspace_size(&p, PNN_PASS_FORWARD, nullptr, &bytes, nullptr) != PNN_OK) wrong++;
      std::vector<unsigned char> workspace(bytes);
      p.workspace = workspace.data();
      p.workspace_bytes = bytes;
      if (pnn_forward(&p, nullptr, nullptr) != PNN_OK || output.bits() != expected) wrong++;
    });
  }
  for (std::thread &caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Threads, ErrorsDoNotMix) {
  std::atomic<int64_t> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 6; caller++) {
    callers.emplace_back([&wrong, caller] {
      for (int i = 0; i < 200; i++) {
        pnn_params p;
        pnn_params_init(&p);
        p.groups = -1 - caller;
        pnn_error error;
        if (pnn_forward(&p, nullptr, &error) != PNN_ERROR_VALUE) wrong++;
        if (std::string(error.message).find("groups is " + std::to_string(-1 - caller)) == std::string::npos) wrong++;
      }
    });
  }
  for (std::thread &caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

#if defined(__SANITIZE_THREAD__)
#define PNN_UNDER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define PNN_UNDER_TSAN 1
#endif
#endif

#if !defined(PNN_UNDER_TSAN)  // which does not start threads after a fork from a threaded process
// A hash of what the child computes, through a pipe; 0 where it failed.
template <class Compute>
uint64_t in_child(Compute compute) {
  int ends[2];
  if (pipe(ends) != 0) return 0;
  const pid_t child = fork();
  if (child == 0) {
    uint64_t hash = 14695981039346656037u;
    for (uint64_t v : compute()) hash = (hash ^ v) * 1099511628211u;
    const bool written = write(ends[1], &hash, sizeof hash) == static_cast<ssize_t>(sizeof hash);
    _exit(written ? 0 : 1);
  }
  close(ends[1]);
  uint64_t hash = 0;
  if (child < 0 || read(ends[0], &hash, sizeof hash) != static_cast<ssize_t>(sizeof hash)) hash = 0;
  close(ends[0]);
  int status = 1;
  if (child > 0) waitpid(child, &status, 0);
  return status == 0 ? hash : 0;
}

uint64_t hash_of(const std::vector<uint64_t> &values) {
  uint64_t hash = 14695981039346656037u;
  for (uint64_t v : values) hash = (hash ^ v) * 1099511628211u;
  return hash;
}

TEST(Threads, AfterAFork) {
  for (const Case &c : cases()) {
    SCOPED_TRACE(c.describe());
    ThreadHost parents(3);
    const uint64_t expected = hash_of(results(c, parents.get()));
    EXPECT_EQ(in_child([&] { return results(c); }), expected) << "serial in the child";
    EXPECT_EQ(in_child([&] {
                ThreadHost host(3, TaskOrder::kShuffled);
                return results(c, host.get());
              }),
              expected)
        << "threads of the child's own";
  }
}

// The default host, used by the parent and then by the child.
TEST(Threads, DefaultHostAfterAFork) {
  const Case c = cases()[4];
  const uint64_t expected = hash_of(results(c, pnn_default_host()));
  EXPECT_EQ(in_child([&] { return results(c, pnn_default_host()); }), expected);
}

// A fork while another thread is inside a call. That thread also allocates, and a child of the address sanitizer hangs
// where the fork finds its allocator locked (GCC 12), so this one is left to the builds without it.
#if !defined(__SANITIZE_ADDRESS__)
TEST(Threads, ForkDuringACall) {
  const Case c = cases()[2];
  const uint64_t expected = hash_of(results(c));
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) results(cases()[5]);
  });
  for (int i = 0; i < 5; i++) EXPECT_EQ(in_child([&] { return results(c); }), expected);
  stop = true;
  busy.join();
}
#endif
#endif

}  // namespace
}  // namespace pnn_test
