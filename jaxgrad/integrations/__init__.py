"""Drop-in functions for scripts written for other libraries; each module needs the library it is named after."""
