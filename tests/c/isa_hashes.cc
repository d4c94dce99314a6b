// isa_hashes.cc - prints the instruction set in use and a hash of each of many results. Any two runs, with any
// PNN_MAX_ISA, on any machine, must agree from the second line on:
//
//     diff <(PNN_MAX_ISA=portable isa_hashes | tail -n +2) <(qemu-aarch64 isa_hashes | tail -n +2)
#include "isa_hashes.h"

int main() {
  pnn_test::print_isa_hashes(stdout);
  return 0;
}
