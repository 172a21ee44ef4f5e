"""containerd's hosts.toml: what it may say, and what it may not."""

from __future__ import annotations

import string
from pathlib import PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs import errors
from imagefs.origin import hosts
from imagefs.origin.hosts import ALL, Host

FOLDER = PurePath("/etc/certs.d/reg.example")

FULL = """
server = "https://real.example:5443"
skip_verify = true
[host."https://mirror.example"]
  capabilities = ["pull"]
  ca = "mirror.crt"
  client = [["client.cert", "client.key"], "both.pem", ["one.pem", ""]]
  dial_timeout = "1m30s"
  [host."https://mirror.example".header]
    X-Cluster = "blue"
    Accept-Language = ["de", "en"]
[host."http://10.0.0.1:5000/harbor/proxy"]
  capabilities = ["pull", "resolve"]
  override_path = true
  ca = ["/abs/a.crt", "b.crt"]
[host."second.example/prefix/"]
[host."https://third.example/v2"]
  some_future_key = 5
"""


class TestParse:
    def test_everything(self) -> None:
        found = hosts.parse(FULL, FOLDER)
        assert found.server == Host("https://real.example:5443", skip_verify=True)
        assert found.mirrors == (
            Host(
                "https://mirror.example",
                capabilities=frozenset({"pull"}),
                ca_files=(FOLDER / "mirror.crt",),
                client_certificates=(
                    (FOLDER / "client.cert", FOLDER / "client.key"),
                    (FOLDER / "both.pem", None),
                    (FOLDER / "one.pem", None),
                ),
                dial_timeout_seconds=90,
                fields={"X-Cluster": "blue", "Accept-Language": "de, en"},
            ),
            Host(
                "http://10.0.0.1:5000",
                "/harbor/proxy",
                frozenset({"pull", "resolve"}),
                ca_files=(PurePath("/abs/a.crt"), FOLDER / "b.crt"),
            ),
            Host("https://second.example", "/prefix/v2"),
            Host("https://third.example", "/v2"),
        )

    def test_nothing(self) -> None:
        assert hosts.parse("", FOLDER) == hosts.Hosts()

    def test_keys_of_the_server_without_its_name(self) -> None:
        found = hosts.parse('capabilities = ["push"]\nca = "x.crt"\n', FOLDER)
        assert found.server == Host(capabilities=frozenset({"push"}), ca_files=(FOLDER / "x.crt",))

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("not toml", "not TOML"),
            ("host = 5", "host is not a table"),
            ('[host]\n"https://a" = 5', "'https://a' is not a table"),
            ("server = 5", "server is not a string"),
            ('server = "https://u:p4ss@h"', "expected http"),
            ('server = "https://h?x=p4ss"', "expected http"),
            ('server = "ftp://h"', "hosts.toml"),
            ('server = "https://h:99999999"', "hosts.toml"),
            ('server = "https://[::1"', "not a URL"),
            ('server = "https://h/a b"', "no path"),
            ('capabilities = ["admin"]', "capabilities"),
            ('capabilities = "pull"', "capabilities is not a list"),
            ("ca = 5", "ca is not a file name"),
            ('ca = [["a"]]', "ca is not a file name"),
            ('client = [["a", "b", "c"]]', "a pair"),
            ('skip_verify = "yes"', "skip_verify"),
            ('override_path = "yes"', "override_path"),
            ('dial_timeout = "soon"', "dial_timeout"),
            ("dial_timeout = 5", "dial_timeout"),
            ("header = 5", "header is not a table"),
            ('[header]\n"a b" = "p4ss"', "name of a header"),
            ('[header]\nX = "p4ss\\r\\nEvil: 1"', "the value of X"),
            ("[header]\nX = 5", "the value of X"),
        ],
    )
    def test_malformed(self, text: str, said: str) -> None:
        with pytest.raises(errors.InvalidInputError, match=said) as caught:
            hosts.parse(text, FOLDER)
        assert str(FOLDER) in str(caught.value)
        assert "p4ss" not in str(caught.value)

    def test_too_many_hosts(self) -> None:
        text = "".join(f'[host."https://h{n}"]\n' for n in range(hosts.MAX_HOSTS + 1))
        with pytest.raises(errors.InvalidInputError, match="at most"):
            hosts.parse(text, FOLDER)

    def test_header_fields_are_in_no_repr(self) -> None:
        found = hosts.parse('[host."https://m".header]\nAuthorization = "Basic s3cret"\n', FOLDER)
        assert found.mirrors[0].fields["Authorization"] == "Basic s3cret"
        assert "s3cret" not in repr(found)

    @given(st.text(max_size=200))
    def test_any_text(self, text: str) -> None:
        try:
            hosts.parse(text, FOLDER)
        except errors.InvalidInputError:
            return

    @given(
        st.lists(st.sampled_from(string.ascii_lowercase), unique=True, max_size=8),
        st.dictionaries(
            st.sampled_from(
                ["capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"]
            ),
            st.sampled_from(
                ['"x"', "5", "true", '["pull"]', '[["a", "b"]]', "{ a = 1 }", '{ A = "b" }', "[]"]
            ),
        ),
    )
    def test_order_is_that_of_the_file_whatever_the_keys(
        self, names: list[str], keys: dict[str, str]
    ) -> None:
        lines = "".join(f"{key} = {value}\n" for key, value in keys.items())
        text = "".join(f'[host."https://{name}"]\n{lines}' for name in names)
        try:
            found = hosts.parse(text, FOLDER)
        except errors.InvalidInputError:
            return
        assert [host.url for host in found.mirrors] == [f"https://{name}" for name in names]
        assert all(host.capabilities <= ALL for host in found.mirrors)


def test_folder_names() -> None:
    assert hosts.folder_names("reg.example") == ("reg.example", "_default")
    assert hosts.folder_names("reg.example:5000") == ("reg.example_5000_", "reg.example:5000", "_default")


def test_folder_with_certificates_only() -> None:
    found = hosts.from_certificates(["b.crt", "a.crt", "x.cert", "x.key", "y.cert", "README"], FOLDER)
    assert found.server.ca_files == (FOLDER / "a.crt", FOLDER / "b.crt")
    assert found.server.client_certificates == (
        (FOLDER / "x.cert", FOLDER / "x.key"),
        (FOLDER / "y.cert", None),
    )


def test_docker_hub_has_a_server_of_another_name() -> None:
    assert hosts.default_server("docker.io") == "https://registry-1.docker.io"
    assert hosts.default_server("reg.example") is None
