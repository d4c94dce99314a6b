# Installs libpnn into a folder of its own and builds and runs the programs of this folder and of package-cuda against
# it, as a stranger would: `cmake --install`, find_package(pnn), pnn::pnn and pnn::pnn_static. find_package(pnn
# COMPONENTS cuda) gives pnn::cuda where HAVE_CUDA, and else stops with a message that says what to do.

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "failed (${status}): ${command}\n${output}")
  endif()
  message(STATUS "${output}")
endfunction()

function(run_failing pattern)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  string(REGEX REPLACE "[ \n]+" " " output "${output}") # CMake wraps its messages
  if(status EQUAL 0 OR NOT output MATCHES "${pattern}")
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "should have failed with '${pattern}', ended with ${status}: ${command}\n${output}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK_DIR})
run(${CMAKE_COMMAND} --install ${BUILD_DIR} --component pnn --config ${CONFIG} --prefix ${WORK_DIR}/prefix)
set(options -DCMAKE_BUILD_TYPE=${CONFIG} -DCMAKE_C_COMPILER=${C_COMPILER} -DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix)
run(${CMAKE_COMMAND} -S ${SOURCE_DIR} -B ${WORK_DIR}/build ${options})
run(${CMAKE_COMMAND} --build ${WORK_DIR}/build --config ${CONFIG})
run(${WORK_DIR}/build/program)
run(${WORK_DIR}/build/program_static)

set(configure_cuda ${CMAKE_COMMAND} -S ${SOURCE_DIR}-cuda -B ${WORK_DIR}/build-cuda ${options})
if(HAVE_CUDA)
  run(${configure_cuda})
  run(${CMAKE_COMMAND} --build ${WORK_DIR}/build-cuda --config ${CONFIG})
  run(${WORK_DIR}/build-cuda/program)
  run_failing("find_package.CUDAToolkit. did not find it: set CUDAToolkit_ROOT"
              ${configure_cuda} --fresh -DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON)
else()
  run_failing("was built without its CUDA half .*configure it with -DPNN_CUDA=ON" ${configure_cuda})
  if(EXISTS ${WORK_DIR}/prefix/include/pnn/pnn_cuda.h)
    message(FATAL_ERROR "pnn_cuda.h was installed, and the library that it describes was not")
  endif()
endif()
