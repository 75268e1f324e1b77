/* Intel's library asks this about the processor before it chooses its kernels. Built at set-up where a compiler is
   there, see mkl.py. It looks at the instructions that the processor has, too: only the maker's name is passed over. */
int mkl_serv_intel_cpu_true(void) { return 1; }
