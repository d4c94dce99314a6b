// isa_test.cc - results and masks have the same bits on every instruction set that this machine has (bfloat16 where
// `exact` is set) and with every size of its caches, and PNN_MAX_ISA and PNN_L2_BYTES really chose. Both are fixed at a
// process's first call, so this program runs itself once for each, with --print-hashes or --print-near.
#include "isa_hashes.h"

#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

extern "C" int64_t pnn_near_bytes(void);  // csrc/internal.h

namespace pnn_test {
namespace {

// Runs this program with one of its arguments and an environment variable set to `value` (nullptr: unset), and returns
// what it prints.
std::string print_under(const char *variable, const char *value, const char *argument) {
  std::string command =
      value != nullptr ? std::string(variable) + "='" + value + "' " : "env -u " + std::string(variable) + " ";
  // The shell would resolve /proc/self to itself.
  char path[4096] = {};
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
  EXPECT_GT(length, 0);
  command += std::string("'") + path + "' " + argument;
  std::FILE *pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) {
    ADD_FAILURE() << "could not run " << command;
    return "";
  }
  std::string text;
  char buffer[4096];
  while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) text += buffer;
  EXPECT_EQ(pclose(pipe), 0) << command;
  return text;
}

std::string print_under(const char *cap) { return print_under("PNN_MAX_ISA", cap, "--print-hashes"); }

std::string isa_of(const std::string &text) {
  const size_t end = text.find('\n');
  return text.substr(0, 4) == "isa " && end != std::string::npos ? text.substr(4, end - 4) : "";
}

std::string hashes_of(const std::string &text) {
  const size_t end = text.find('\n');
  return end == std::string::npos ? "" : text.substr(end + 1);
}

void expect_same_lines(const std::string &one, const std::string &other, const std::string &which) {
  std::istringstream left(one);
  std::istringstream right(other);
  std::string a;
  std::string b;
  while (std::getline(left, a)) {
    ASSERT_TRUE(static_cast<bool>(std::getline(right, b))) << which;
    EXPECT_EQ(a, b) << which << " differ";
  }
  EXPECT_FALSE(static_cast<bool>(std::getline(right, b))) << which;
}

// The sets of this machine by the operating system's account, best first.
std::vector<std::string> machine_sets() {
  std::vector<std::string> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(PNN_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    sets.push_back("avx512");
  }
#endif
#if defined(PNN_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    sets.push_back("avx2");
  }
#endif
#elif defined(__aarch64__) && defined(PNN_HAVE_NEON)
  sets.push_back("neon");
#endif
  sets.push_back("portable");
  return sets;
}

TEST(Isa, EverySetOfThisMachineGivesTheSameBits) {
  const std::vector<std::string> sets = machine_sets();
  const std::string first = print_under(sets.front().c_str());
  ASSERT_GT(hashes_of(first).size(), 2000u);
  int64_t ran = 0;
  for (const std::string &set : sets) {
    const std::string text = print_under(set.c_str());
    EXPECT_EQ(isa_of(text), set) << "PNN_MAX_ISA=" << set << " on a machine that has it";
    std::printf("[          ] %s ran\n", isa_of(text).c_str());
    expect_same_lines(hashes_of(first), hashes_of(text), sets.front() + " and " + set);
    ran++;
  }
  EXPECT_EQ(ran, static_cast<int64_t>(sets.size()));
}

TEST(Isa, WithoutACapTheBestRuns) { EXPECT_EQ(isa_of(print_under(nullptr)), machine_sets().front()); }

TEST(Isa, UnknownCapsChangeNothing) {
  const std::string best = machine_sets().front();
  for (const char *cap : {"", "nonsense", "AVX2", "avx", "avx5122", "avx2x", "avx2 ", "portables", "port", "sse2"})
    EXPECT_EQ(isa_of(print_under(cap)), best) << cap;
#if defined(__x86_64__)
  EXPECT_EQ(isa_of(print_under("neon")), best);
#endif
}

TEST(Cache, EverySizeGivesTheSameBits) {
  const std::string first = print_under("PNN_L2_BYTES", "131072", "--print-hashes");
  ASSERT_GT(hashes_of(first).size(), 2000u);
  for (const char *bytes : {"262144", "393216", "524288"}) {
    const std::string text = print_under("PNN_L2_BYTES", bytes, "--print-hashes");
    expect_same_lines(first, text, std::string("131072 and ") + bytes);
  }
}

TEST(Cache, BlocksAreSizedForIt) {
  const auto near_bytes = [](const char *bytes) {
    return std::stoll("0" + print_under("PNN_L2_BYTES", bytes, "--print-near"));
  };
  const int64_t unset = near_bytes(nullptr);
  EXPECT_EQ(unset % 131072, 0);
  EXPECT_GE(unset, 131072);
  EXPECT_LE(unset, 524288);
  EXPECT_EQ(near_bytes("1"), 131072);
  EXPECT_EQ(near_bytes("262143"), 131072);
  EXPECT_EQ(near_bytes("262144"), 262144);
  EXPECT_EQ(near_bytes("400000"), 393216);
  EXPECT_EQ(near_bytes("1048576"), 524288);
  EXPECT_EQ(near_bytes("99999999999999999999"), 524288);
  for (const char *nothing : {"", "0", "-131072", "nonsense", "256K", "131072 "})
    EXPECT_EQ(near_bytes(nothing), unset) << nothing;
}

TEST(Isa, HashesSeeEveryBit) {
  // A hash that ignored its input would make every comparison above pass.
  EXPECT_NE(hash_bits(kHashStart, {1}), hash_bits(kHashStart, {2}));
  EXPECT_NE(hash_bits(kHashStart, {uint64_t{1} << 63}), hash_bits(kHashStart, {0}));
  std::vector<uint64_t> distinct;
  for (const auto &entry : isa_hashes()) distinct.push_back(entry.second);
  std::sort(distinct.begin(), distinct.end());
  EXPECT_EQ(std::unique(distinct.begin(), distinct.end()), distinct.end());
}

}  // namespace
}  // namespace pnn_test

int main(int argc, char **argv) {
  if (argc == 2 && std::string(argv[1]) == "--print-hashes") {
    pnn_test::print_isa_hashes(stdout);
    return 0;
  }
  if (argc == 2 && std::string(argv[1]) == "--print-near") {
    std::printf("%lld\n", static_cast<long long>(pnn_near_bytes()));
    return 0;
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
