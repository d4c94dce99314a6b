# Finds the PyTorch that the Python interpreter would import, without importing it and without find_package(Torch):
# that one fails on the CUDA build of PyPI when no whole CUDA toolkit is installed.
#
# Python_EXECUTABLE names the interpreter. Sets PNN_TORCH_VERSION (2.13.0), PNN_TORCH_MINOR (2.13), PNN_TORCH_ROOT (the
# package directory), the target pnn_torch (headers, libraries, language standard) and the function pnn_torch_library.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)

# Under pip's build isolation the interpreter is the target environment's own, but PYTHONPATH and a sitecustomize hide
# that environment's packages; -E ignores both, and shows them.
foreach(isolation "" "-E")
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${isolation} ${CMAKE_CURRENT_LIST_DIR}/locate_torch.py
    WORKING_DIRECTORY ${CMAKE_CURRENT_LIST_DIR}
    OUTPUT_VARIABLE located ERROR_VARIABLE locate_error RESULT_VARIABLE locate_status
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(locate_status EQUAL 0)
    break()
  endif()
endforeach()
if(NOT locate_status EQUAL 0)
  message(FATAL_ERROR
    "no PyTorch found by ${Python_EXECUTABLE}:\n  ${locate_error}\n"
    "The operators are compiled for the PyTorch they will run in, so install that first "
    "(for example `pip install torch==2.13.0`), then run `pip install --no-build-isolation .` with the same "
    "interpreter. For CMake alone: -DPython_EXECUTABLE=/path/to/python, or -DPNN_TORCH=OFF for the C library without "
    "PyTorch.")
endif()
list(GET located 0 PNN_TORCH_VERSION)
list(GET located 1 PNN_TORCH_ROOT)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" PNN_TORCH_MINOR "${PNN_TORCH_VERSION}")

if(PNN_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "PyTorch ${PNN_TORCH_VERSION} in ${PNN_TORCH_ROOT} is too old: torch-pnn needs 2.11 or newer")
endif()
foreach(file include/ATen/ATen.h include/torch/csrc/stable/library.h include/torch/headeronly/version.h
             lib/libtorch_cpu.so lib/libc10.so)
  if(NOT EXISTS ${PNN_TORCH_ROOT}/${file})
    message(FATAL_ERROR
      "PyTorch ${PNN_TORCH_VERSION} in ${PNN_TORCH_ROOT} lacks ${file}: its C++ headers or libraries are missing. "
      "PyPI's packages have them; some distributions put them into a package of their own (Debian: libtorch-dev).")
  endif()
endforeach()
message(STATUS "PyTorch ${PNN_TORCH_VERSION} in ${PNN_TORCH_ROOT}")

# A changed PyTorch in the same place (pip install --upgrade) configures anew.
set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PNN_TORCH_ROOT}/version.py)

add_library(pnn_torch INTERFACE)
target_include_directories(pnn_torch SYSTEM INTERFACE
  ${PNN_TORCH_ROOT}/include ${PNN_TORCH_ROOT}/include/torch/csrc/api/include)
target_link_libraries(pnn_torch INTERFACE ${PNN_TORCH_ROOT}/lib/libtorch_cpu.so ${PNN_TORCH_ROOT}/lib/libc10.so)
# 2.14's headers ask for C++20, 2.11's to 2.13's for C++17.
if(PNN_TORCH_VERSION VERSION_GREATER_EQUAL 2.14)
  target_compile_features(pnn_torch INTERFACE cxx_std_20)
else()
  target_compile_features(pnn_torch INTERFACE cxx_std_17)
endif()

# pnn_torch_library(NAME source...): a library of operators as Python loads it. torch is imported before, so that no run
# path is needed, and none of this machine's folders is left in the file.
function(pnn_torch_library target)
  add_library(${target} SHARED ${ARGN})
  target_link_libraries(${target} PRIVATE pnn_torch)
  target_compile_options(${target} PRIVATE ${PNN_CXX_FLAGS} -ffile-prefix-map=${PNN_TORCH_ROOT}/=torch/)
  target_include_directories(${target} PRIVATE ${PNN_GENERATED_DIR})
  target_link_options(${target} PRIVATE ${PNN_NO_UNDEFINED})
  set_target_properties(${target} PROPERTIES
    CXX_EXTENSIONS OFF SKIP_BUILD_RPATH ON SKIP_INSTALL_RPATH ON)
endfunction()
