/* print_isa.c - prints the instruction set that libpnn runs here, for tests/run.py. */
#include <stdio.h>

#include "pnn/pnn.h"

int main(void) { return puts(pnn_isa_name()) < 0; }
