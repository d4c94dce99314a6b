# What `cmake --install` lays down.
#
#     --component pnn        the C library: include/pnn, lib/libpnn.so, lib/libpnn.a and find_package(pnn) -> pnn::pnn,
#                            pnn::pnn_static; with PNN_CUDA also lib/libpnn_cuda.a -> pnn::cuda
#     --component torch_pnn  the operators for C++ programs: include/torch_pnn, lib/ and find_package(torch_pnn) ->
#                            torch_pnn::torch_pnn
#     --component python     the same as the Python wheel carries it, in torch_pnn/include, lib and share/cmake

if(NOT PNN_INSTALL_PYTHON)
  set(installed pnn_static)
  if(PNN_SHARED)
    list(APPEND installed pnn)
  endif()
  install(TARGETS ${installed} EXPORT pnnTargets COMPONENT pnn)
  if(PNN_HAVE_CUDA)
    install(TARGETS pnn_cuda EXPORT pnnCudaTargets COMPONENT pnn)
    install(EXPORT pnnCudaTargets NAMESPACE pnn:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/pnn COMPONENT pnn)
  else()
    set(left_out PATTERN pnn_cuda.h EXCLUDE)
  endif()
  install(DIRECTORY csrc/include/pnn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT pnn
    FILES_MATCHING PATTERN "*.h" ${left_out})
  install(EXPORT pnnTargets NAMESPACE pnn:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/pnn COMPONENT pnn)
  configure_package_config_file(cmake/pnnConfig.cmake.in ${PROJECT_BINARY_DIR}/pnnConfig.cmake
    INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/pnn)
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/pnnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
  install(FILES ${PROJECT_BINARY_DIR}/pnnConfig.cmake ${PROJECT_BINARY_DIR}/pnnConfigVersion.cmake LICENSE
    DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/pnn COMPONENT pnn)
endif()

if(PNN_TORCH)
  set(operators torch_pnn_ops)
  if(PNN_AUTOGRAD)
    list(APPEND operators torch_pnn_autograd)
  endif()
  if(TARGET torch_pnn_cuda)
    list(APPEND operators torch_pnn_cuda)
  endif()
  add_custom_target(torch_pnn_libraries DEPENDS ${operators}) # what pip builds
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/torch_pnnConfigVersion.cmake COMPATIBILITY SameMinorVersion)

  function(install_operators component include_dir library_dir package_dir)
    install(TARGETS ${operators} LIBRARY DESTINATION ${library_dir} COMPONENT ${component})
    install(FILES ${CMAKE_LIBRARY_OUTPUT_DIRECTORY}/libtorch_pnn_cuda.missing.txt
      DESTINATION ${library_dir} COMPONENT ${component})
    install(DIRECTORY csrc/torch/include/torch_pnn DESTINATION ${include_dir} COMPONENT ${component}
      FILES_MATCHING PATTERN "*.h")
    set(TORCH_PNN_LIBRARY_DIR ${library_dir})
    set(TORCH_PNN_INCLUDE_DIR ${include_dir})
    configure_package_config_file(
      cmake/torch_pnnConfig.cmake.in ${PROJECT_BINARY_DIR}/${component}/torch_pnnConfig.cmake
      INSTALL_DESTINATION ${package_dir} PATH_VARS TORCH_PNN_LIBRARY_DIR TORCH_PNN_INCLUDE_DIR)
    install(FILES ${PROJECT_BINARY_DIR}/${component}/torch_pnnConfig.cmake
                  ${PROJECT_BINARY_DIR}/torch_pnnConfigVersion.cmake
      DESTINATION ${package_dir} COMPONENT ${component})
  endfunction()
  if(NOT PNN_INSTALL_PYTHON)
    install_operators(
      torch_pnn ${CMAKE_INSTALL_INCLUDEDIR} ${CMAKE_INSTALL_LIBDIR} ${CMAKE_INSTALL_LIBDIR}/cmake/torch_pnn)
  else()
    install_operators(python torch_pnn/include torch_pnn/lib torch_pnn/share/cmake/torch_pnn)
  endif()
endif()
