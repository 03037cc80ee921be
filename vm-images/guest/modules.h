/* Loads kernel modules from /modules, in the order that /modules/list gives. */
#ifndef QPC_MODULES_H
#define QPC_MODULES_H

/* `names` are separated by commas.  Each line of the list is a module's name and the files to load
 * for it; a module that the kernel has built in has none.  Ends the guest if one cannot be loaded. */
void modules_load(const char *names);

#endif
