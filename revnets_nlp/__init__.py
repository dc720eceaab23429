"""The name under which a wheel installs nlp/. In a checkout it stands for that folder, so that commands find it."""

import nlp

__path__ = nlp.__path__
