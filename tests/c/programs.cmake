# Programs of their own among the C tests: isa_hashes prints hashes of results, threads_shared_test runs on the shared
# library, fuzz_params feeds libFuzzer.

add_executable(isa_hashes c/isa_hashes.cc)
target_include_directories(isa_hashes PRIVATE c)
target_compile_features(isa_hashes PRIVATE cxx_std_17)
target_compile_options(isa_hashes PRIVATE -ffp-contract=off -Wall -Wextra $<$<BOOL:${PNN_WERROR}>:-Werror>)
target_link_libraries(isa_hashes PRIVATE pnn_static)
set_target_properties(isa_hashes PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)

# The same calls from many threads and after forks with the shared library, whose default host is OpenMP.
if(TARGET pnn AND NOT PNN_SANITIZE)
  add_executable(threads_shared_test c/threads_test.cc)
  target_include_directories(threads_shared_test PRIVATE c)
  target_compile_features(threads_shared_test PRIVATE cxx_std_17)
  target_compile_options(threads_shared_test PRIVATE -ffp-contract=off -Wall -Wextra $<$<BOOL:${PNN_WERROR}>:-Werror>)
  target_link_libraries(threads_shared_test PRIVATE pnn GTest::gtest GTest::gtest_main Threads::Threads)
  set_target_properties(threads_shared_test PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  gtest_discover_tests(threads_shared_test TEST_PREFIX "threads_shared_test: "
    PROPERTIES LABELS c TIMEOUT 300 DISCOVERY_TIMEOUT 60)
endif()

# -DPNN_FUZZ=ON -DPNN_SANITIZE=address,undefined, with clang as the C and C++ compiler; then, for half a minute,
#     tests/fuzz_params -max_total_time=30 -max_len=512
option(PNN_FUZZ "Build fuzz_params, which feeds libpnn random descriptors (clang only)" OFF)
if(PNN_FUZZ)
  if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    message(FATAL_ERROR "PNN_FUZZ needs clang's libFuzzer, and the C++ compiler is ${CMAKE_CXX_COMPILER_ID}: "
      "-DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++")
  endif()
  # The library reports its branches to the fuzzer, too.
  foreach(part IN ITEMS pnn_core pnn_static)
    target_compile_options(${part} PRIVATE -fsanitize=fuzzer-no-link)
  endforeach()
  add_executable(fuzz_params c/fuzz_params.cc)
  target_include_directories(fuzz_params PRIVATE c)
  target_compile_features(fuzz_params PRIVATE cxx_std_17)
  target_compile_options(fuzz_params PRIVATE -fsanitize=fuzzer -Wall -Wextra)
  target_link_options(fuzz_params PRIVATE -fsanitize=fuzzer)
  target_link_libraries(fuzz_params PRIVATE pnn_static)
  set_target_properties(fuzz_params PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
endif()
