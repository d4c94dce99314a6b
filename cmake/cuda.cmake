# The CUDA half of libpnn: target pnn_cuda, and with PNN_TORCH the operators torch_pnn_cuda.
#
# PNN_CUDA = OFF, the default, since it takes minutes to compile; AUTO builds it where nvcc is found and PyTorch, if any
# is built against, is a CUDA build; ON insists. The reason for leaving it out, PNN_CUDA_MISSING, is printed, and
# `torch-pnn info` and find_package(pnn COMPONENTS cuda) repeat it.
#
# nvcc is called directly: CMake's own CUDA language links test programs against parts of the toolkit that small
# installations lack. The nvcc on the PATH may be a wrapper script, so the toolkit's root is asked of nvcc itself.
# The CUDA runtime is linked statically: the library then fits any PyTorch, whatever CUDA that brings.

set(PNN_CUDA OFF CACHE STRING "Build the CUDA half: AUTO (with nvcc and a CUDA build of PyTorch), ON or OFF")
set(PNN_CUDA_ARCHITECTURES "80;86;89;90;100;120" CACHE STRING
    "Compute capabilities, times ten, to make machine code for; the last one's PTX goes along for newer devices")
set(PNN_CUDA_OBJECTS "" CACHE PATH
    "Link what another build of these sources compiled (BUILD/cuda) instead of compiling it")
option(PNN_GPU_CHECK "Build the programs that tests/cuda/gpu_check.py runs" OFF)
set(PNN_HAVE_CUDA OFF)

function(pnn_find_nvcc)
  set(hints ${CUDAToolkit_ROOT} $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda)
  list(TRANSFORM hints APPEND /bin)
  find_program(PNN_NVCC nvcc HINTS ${hints} DOC "The CUDA compiler")
  if(NOT PNN_NVCC)
    return()
  endif()
  # A dry run names the toolkit's root as TOP, through any wrapper.
  file(WRITE ${PROJECT_BINARY_DIR}/cuda/probe.cu "")
  set(probe ${PROJECT_BINARY_DIR}/cuda/probe)
  execute_process(COMMAND ${PNN_NVCC} --dryrun -c ${probe}.cu -o ${probe}.o
                  ERROR_VARIABLE dry_run OUTPUT_VARIABLE dry_run_output RESULT_VARIABLE status)
  if(status EQUAL 0 AND "${dry_run}${dry_run_output}" MATCHES "TOP=([^\n]+)")
    file(REAL_PATH "${CMAKE_MATCH_1}" root)
    set(PNN_CUDA_ROOT ${root} PARENT_SCOPE)
  endif()
  execute_process(COMMAND ${PNN_NVCC} --version OUTPUT_VARIABLE version ERROR_QUIET)
  if(version MATCHES "release ([0-9]+\\.[0-9]+)")
    set(PNN_CUDA_VERSION ${CMAKE_MATCH_1} PARENT_SCOPE)
  endif()
endfunction()

# Sets PNN_CUDA_MISSING to why the CUDA half can't be built, or to nothing.
set(PNN_CUDA_MISSING "")
if(NOT PNN_CUDA STREQUAL "OFF")
  if(PNN_CUDA STREQUAL "AUTO" AND PNN_SANITIZE)
    set(PNN_CUDA_MISSING "sanitizers are on")
  elseif(PNN_CUDA STREQUAL "AUTO" AND NOT PNN_TORCH)
    set(PNN_CUDA_MISSING "PNN_TORCH is off")
  elseif(PNN_TORCH AND NOT EXISTS ${PNN_TORCH_ROOT}/lib/libtorch_cuda.so)
    set(PNN_CUDA_MISSING "this PyTorch is not a CUDA build")
  else()
    pnn_find_nvcc()
    if(NOT PNN_NVCC)
      set(PNN_CUDA_MISSING "no nvcc was found (CUDA_HOME or -DCUDAToolkit_ROOT name its toolkit)")
    elseif(NOT PNN_CUDA_ROOT)
      set(PNN_CUDA_MISSING "${PNN_NVCC} does not run")
    elseif(PNN_CUDA_VERSION VERSION_LESS 13.0)
      set(PNN_CUDA_MISSING "CUDA ${PNN_CUDA_VERSION} in ${PNN_CUDA_ROOT} is older than 13.0")
    else()
      find_file(PNN_CUDART libcudart_static.a HINTS ${PNN_CUDA_ROOT}/lib64 ${PNN_CUDA_ROOT}/lib NO_DEFAULT_PATH)
      find_path(PNN_CUDA_INCLUDE cuda_runtime_api.h
                HINTS ${PNN_CUDA_ROOT}/include ${PNN_CUDA_ROOT}/targets/x86_64-linux/include NO_DEFAULT_PATH)
      if(NOT PNN_CUDART OR NOT PNN_CUDA_INCLUDE)
        set(PNN_CUDA_MISSING "the toolkit in ${PNN_CUDA_ROOT} lacks libcudart_static.a or cuda_runtime_api.h")
      endif()
    endif()
  endif()
  if(PNN_CUDA_MISSING AND PNN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PNN_CUDA is ON, and the CUDA half can't be built: ${PNN_CUDA_MISSING}")
  endif()
else()
  set(PNN_CUDA_MISSING "PNN_CUDA is OFF")
endif()
if(PNN_TORCH)
  # Beside the operators, for `torch-pnn info`; empty where the half is built.
  file(CONFIGURE OUTPUT ${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/libtorch_pnn_cuda.missing.txt
       CONTENT "${PNN_CUDA_MISSING}\n" @ONLY)
endif()
if(PNN_CUDA_MISSING)
  message(STATUS "The GPU half is left out: ${PNN_CUDA_MISSING}; -DPNN_CUDA=ON insists on it")
  return()
endif()
set(PNN_HAVE_CUDA ON)

string(REPLACE ";" "_" architectures "sm_${PNN_CUDA_ARCHITECTURES}")
if(PNN_CUDA_OBJECTS)
  message(STATUS "The GPU half: CUDA ${PNN_CUDA_VERSION} in ${PNN_CUDA_ROOT}, compiled in ${PNN_CUDA_OBJECTS}")
else()
  message(STATUS "The GPU half: CUDA ${PNN_CUDA_VERSION} in ${PNN_CUDA_ROOT} for ${architectures}")
endif()
set(cuda_flags -std=c++17 -O3
  # A fused multiply-add happens where it is written, as on the host: both must give the same bits.
  -fmad=false
  -I${PROJECT_SOURCE_DIR}/csrc/include -I${PROJECT_SOURCE_DIR}/csrc -I${PROJECT_SOURCE_DIR}/cuda
  -DPNN_CUDA_ARCHITECTURES=${architectures} # a word: nvcc takes quotes and commas apart
  -Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra,-Wno-unknown-pragmas
  # A kernel that keeps registers in memory is a mistake on every architecture.
  -Xptxas=-warn-spills,-warn-lmem-usage)
if(PNN_WERROR)
  list(APPEND cuda_flags -Werror=all-warnings -Xptxas=-Werror)
endif()
set(cuda_targets "")
foreach(architecture IN LISTS PNN_CUDA_ARCHITECTURES)
  list(APPEND cuda_targets -gencode=arch=compute_${architecture},code=sm_${architecture})
endforeach()
list(GET PNN_CUDA_ARCHITECTURES -1 newest)
list(APPEND cuda_targets -gencode=arch=compute_${newest},code=compute_${newest})

file(GLOB cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/cuda/*.cu)
# What takes longest to compile begins first.
set(longest ${PROJECT_SOURCE_DIR}/cuda/weight_gradient_wgmma.cu ${PROJECT_SOURCE_DIR}/cuda/weight_gradient.cu)
list(REMOVE_ITEM cuda_sources ${longest})
list(PREPEND cuda_sources ${longest})
# Hopper's asynchronous products are of sm_90a alone, which no other device runs.
if(90 IN_LIST PNN_CUDA_ARCHITECTURES)
  list(APPEND cuda_flags -DPNN_CUDA_WGMMA)
else()
  list(FILTER cuda_sources EXCLUDE REGEX "_wgmma[.]cu$")
endif()
set(cuda_objects "")
foreach(source IN LISTS cuda_sources)
  get_filename_component(name ${source} NAME_WE)
  if(PNN_CUDA_OBJECTS)
    list(APPEND cuda_objects ${PNN_CUDA_OBJECTS}/${name}.o)
    continue()
  endif()
  set(object ${PROJECT_BINARY_DIR}/cuda/${name}.o)
  set(targets ${cuda_targets})
  if(source MATCHES "_wgmma[.]cu$")
    set(targets -gencode=arch=compute_90a,code=sm_90a)
  endif()
  add_custom_command(OUTPUT ${object}
    COMMAND ${PNN_NVCC} ${cuda_flags} ${targets} -MD -MF ${object}.d -MT ${object} -c ${source} -o ${object}
    DEPENDS ${source} DEPFILE ${object}.d COMMENT "Compiling cuda/${name}.cu for the GPU" VERBATIM)
  list(APPEND cuda_objects ${object})
endforeach()

enable_language(CXX) # to link with
add_library(pnn_cuda STATIC ${cuda_objects})
add_library(pnn::cuda ALIAS pnn_cuda)
set_target_properties(pnn_cuda PROPERTIES LINKER_LANGUAGE CXX EXPORT_NAME cuda)
target_include_directories(pnn_cuda PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
find_package(Threads REQUIRED)
# Installed, it finds the toolkit of the machine that it is used on (pnnConfig.cmake), and brings a C program the C++
# runtime that nvcc's host code needs.
target_link_libraries(pnn_cuda PUBLIC pnn_static
  $<BUILD_INTERFACE:${PNN_CUDART}> $<BUILD_INTERFACE:Threads::Threads> $<BUILD_INTERFACE:${CMAKE_DL_LIBS}>
  $<BUILD_INTERFACE:rt> $<INSTALL_INTERFACE:CUDA::cudart_static>
  $<INSTALL_INTERFACE:$<$<LINK_LANGUAGE:C>:stdc++>>)

if(PNN_GPU_CHECK AND NOT PNN_TESTS)
  enable_testing()
  add_subdirectory(tests/cuda)
endif()

if(PNN_TORCH)
  # The operators' own sources once more, with the CUDA device behind them.
  pnn_torch_library(torch_pnn_cuda ${PROJECT_SOURCE_DIR}/csrc/torch/operators.cpp
    ${PROJECT_SOURCE_DIR}/csrc/torch/params.cpp ${PROJECT_SOURCE_DIR}/csrc/torch/cuda/backend_cuda.cpp)
  target_compile_definitions(torch_pnn_cuda PRIVATE TORCH_PNN_CUDA TORCH_TARGET_VERSION=0x020b000000000000)
  target_include_directories(torch_pnn_cuda PRIVATE ${PROJECT_SOURCE_DIR}/csrc/torch)
  # torch_pnn_ops, loaded before, defines the schemas and keeps the settings.
  target_link_libraries(torch_pnn_cuda PRIVATE pnn_cuda torch_pnn_ops ${PNN_TORCH_ROOT}/lib/libtorch_cuda.so)
endif()
