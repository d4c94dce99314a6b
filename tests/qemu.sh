#!/bin/bash
# The promise of the same bits on every instruction set, on processors that this machine is not, under qemu.
#
#     tests/qemu.sh [build folder]        (default build/dev; `make test-qemu`, or `tests/run.py qemu`)
#
# 1. libpnn and tests/c/isa_hashes.cc, compiled for 64-bit Arm and emulated: NEON's and the portable kernels' results
#    have the same hashes as the native ones.
# 2. The native program on an emulated Nehalem, which has neither AVX2 nor fused multiply-add: libpnn takes the portable
#    kernels there, also where PNN_MAX_ISA asks for more, runs no instruction that the processor lacks, and has the same
#    hashes; on a Haswell it takes AVX2 and never AVX-512.
#
# Prints a line per check. Exit status: 0 = all agree, 1 = some do not, 77 = the tools are missing (skipped).
set -eu -o pipefail
cd "$(dirname "$0")/.."
build=${1:-build/dev}
work=build/qemu
native=$build/tests/isa_hashes

missing=
for tool in qemu-aarch64 qemu-x86_64 aarch64-linux-gnu-gcc aarch64-linux-gnu-g++; do
  command -v $tool >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
  echo "skipped:$missing not found (Debian: apt-get install qemu-user g++-aarch64-linux-gnu)"
  exit 77
fi
if [ ! -x "$native" ]; then
  echo "error: $native is missing: build the tests first (make build)" >&2
  exit 1
fi
for source in tests/c/isa_hashes.cc tests/c/isa_hashes.h; do
  if [ $source -nt "$native" ]; then
    echo "error: $native is older than $source: build the tests again (make build)" >&2
    exit 1
  fi
done

mkdir -p $work
"$native" >$work/native.txt
tail -n +2 $work/native.txt >$work/expected.txt
results=$(wc -l <$work/expected.txt)
if [ "$results" -lt 50 ]; then
  echo "error: isa_hashes printed $results results, it should print 50 or more" >&2
  exit 1
fi
echo "native: $(head -n 1 $work/native.txt), $results results"

failed=0
# check WHAT WANTED_ISA COMMAND...: the command's first line is "isa WANTED_ISA" and its results are the native ones.
check() {
  local what=$1 wanted=$2
  shift 2
  if ! "$@" >$work/output.txt 2>$work/error.txt; then
    echo "FAILED $what: exit status $?; $(tail -n 1 $work/error.txt)"
    failed=1
  elif [ "$(head -n 1 $work/output.txt)" != "isa $wanted" ]; then
    echo "FAILED $what: $(head -n 1 $work/output.txt), it should be isa $wanted"
    failed=1
  elif ! tail -n +2 $work/output.txt | cmp -s - $work/expected.txt; then
    echo "FAILED $what: other bits; the first that differ:"
    tail -n +2 $work/output.txt | diff - $work/expected.txt | head -n 4 || true
    failed=1
  else
    echo "ok $what"
  fi
}

# CMake and Ninja as tests/run.py finds them: beside the interpreter, on PATH, or in build/tools.
PATH=$(dirname "${PYTHON:-.venv/bin/python}"):$PATH:$PWD/build/tools/bin
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
cmake -S . -B $work/aarch64 "${generator[@]}" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_BUILD_TYPE=Release -DPNN_SHARED=OFF -DPNN_OPENMP=OFF \
  -DPNN_WERROR=ON >$work/configure.txt || { cat $work/configure.txt; exit 1; }
cmake --build $work/aarch64 -j "$(nproc)" >$work/build.txt || { cat $work/build.txt; exit 1; }
aarch64-linux-gnu-g++ -std=c++17 -O2 -ffp-contract=off -static -Icsrc/include -Icsrc -Itests/c -o $work/isa_hashes \
  tests/c/isa_hashes.cc $work/aarch64/lib/libpnn.a

unset PNN_MAX_ISA
check "64-bit Arm, NEON" neon qemu-aarch64 $work/isa_hashes
check "64-bit Arm, portable" portable env PNN_MAX_ISA=portable qemu-aarch64 $work/isa_hashes
case $(uname -m) in
  x86_64)
    check "Nehalem: no AVX2, no fused multiply-add" portable qemu-x86_64 -cpu Nehalem "$native"
    check "Nehalem, PNN_MAX_ISA=avx512" portable env PNN_MAX_ISA=avx512 qemu-x86_64 -cpu Nehalem "$native"
    check "Haswell: AVX2, no AVX-512" avx2 qemu-x86_64 -cpu Haswell "$native"
    ;;
esac
exit $failed
