# activations_test: activations_kernels.c once per instruction set, with the flags of libpnn's own kernels.

foreach(isa IN LISTS kernel_isas)
  string(TOUPPER ${isa} isa_define)
  add_library(activations_kernels_${isa} OBJECT c/activations_kernels.c)
  target_include_directories(activations_kernels_${isa} PRIVATE ${PROJECT_SOURCE_DIR}/csrc
    ${PROJECT_SOURCE_DIR}/csrc/include)
  target_compile_definitions(activations_kernels_${isa} PRIVATE PNN_ISA_${isa_define})
  target_compile_options(activations_kernels_${isa} PRIVATE ${kernel_flags_${isa}})
  target_link_libraries(activations_kernels_${isa} PRIVATE pnn_flags)
  target_link_libraries(activations_test PRIVATE activations_kernels_${isa})
endforeach()

set(coefficients_python ${Python_EXECUTABLE})
if(NOT coefficients_python)
  find_program(coefficients_python python3)
endif()
if(coefficients_python)
  add_test(NAME "activations: the header holds the derived coefficients"
    COMMAND ${coefficients_python} ${PROJECT_SOURCE_DIR}/csrc/kernels/activation_coefficients.py --check)
  set_tests_properties("activations: the header holds the derived coefficients" PROPERTIES
    LABELS c SKIP_RETURN_CODE 77) # 77: that Python has no mpmath
endif()
