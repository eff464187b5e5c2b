/* The whole main: the program is a .pyx that needs no interpreter. */
int native_main(int argc, char **argv);
int main(int argc, char **argv) { return native_main(argc, argv); }
